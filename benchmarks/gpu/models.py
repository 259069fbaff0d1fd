"""models.csv: whole models and training steps, as CUDA graphs and without, beside PyTorch in its forms.

Parts: ``models`` times ipt_fast beside eager PyTorch and prints where the time goes; ``compiled`` times it beside what
torch.compile makes of a model, which is compiled first, and waits for its turn; ``rest`` is what is left: float32, IPT,
a photo without tiles.
"""

import contextlib
import copy
import cProfile
import pathlib
import pstats

import torch

import ipt_fast
from benchmarks import baseline
from benchmarks.gpu import calls, device, stage, tune
from ipt_fast.kernels import _launch

COLUMNS = (
    "date", "commit", "gpu", "torch", "triton", "model", "shape", "dtype", "direction", "contender", "median_ms",
    "times_faster", "peak_gib", "note",
)  # fmt: skip
PHOTO = ("ipt_v2_base", 1, (2160, 3840))


class Stage:
    """What all parts need."""

    def __init__(self, args):
        self.args, self.gpu = args, device.opened(args.rehearse)
        self.table = stage.Table(args.out / "models.csv", COLUMNS, stage.environment(self.gpu.name))
        self.failures = []
        self.sizes = [(n, b, 64 if args.rehearse else s) for n, b, s in calls.INFERENCE]
        name, batch, size = calls.TRAINING
        self.training = (name, 1, 64) if args.rehearse else (name, batch, size)

    @property
    def tuned(self):
        return tune.kept(self.args, self.gpu.name)

    def model(self, name, dtype, merged=None):
        torch.manual_seed(0)
        with torch.device(self.gpu.device):
            model = ipt_fast.create_model(name, **({} if merged is None else {"merged": merged}))
        return model.to(dtype).to(memory_format=torch.channels_last)

    def image(self, batch, size, dtype):
        height, width = size if isinstance(size, tuple) else (size, size)
        x = torch.rand(batch, 3, height, width, device=self.gpu.device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def timed(self, model, shape, dtype, direction, functions, graphs=True, peaks=True):
        """A row for every contender, {name: function}, as a graph or not; rivals that fail are left out."""
        ready, memory = {}, {}
        for name, function in functions.items():
            try:
                if peaks:
                    memory[name] = self.gpu.peak_gib(function)
                ready[name] = self.gpu.graph(function) if graphs else function
            except Exception as error:
                if name in OURS or stage.is_lost(error):
                    raise
                print(f"left out: {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        found = self.gpu.seconds(ready, rounds=10)
        rivals = [seconds for name, seconds in found.items() if name not in OURS]
        for name, seconds in found.items():
            self.table.add(
                model=model, shape=shape, dtype=str(dtype).removeprefix("torch."), direction=direction,
                contender=name, median_ms=seconds * 1e3, peak_gib=memory.get(name, ""),
                times_faster=min(rivals) / seconds if name in OURS and rivals else "",
                note="" if graphs else "no graph",
            )  # fmt: skip
        return found


OURS = ("triton", "tuned", "mixed")


def on(backend, call, configurations=None):
    """``call`` on a backend; ``configurations`` in place of those that were measured."""

    def run():
        taken = contextlib.nullcontext() if configurations is None else _launch.tuning(configurations)
        with ipt_fast.use_backend(backend), taken:
            return call()

    return run


def plain(call, **overrides):
    def run():
        with baseline.plain_eager(**overrides):
            return call()

    return run


def ours(gpu, call, tuned):
    if gpu.device == "meta":
        return dict.fromkeys(OURS, call)
    return {"triton": on("triton", call, {}), "tuned": on("triton", call, tuned), "mixed": on("auto", call)}


def check(gpu, model, x, functions):
    """Raises unless every output is as near to the reference in float64 as eager PyTorch, or twice as far."""
    if gpu.device == "meta":
        return
    exact = copy.deepcopy(model).double()
    with ipt_fast.use_backend("reference"):
        truth = exact(x.double())
    del exact
    errors = {name: ((f().double() - truth).abs().max() / truth.abs().max()).item() for name, f in functions.items()}
    print(f"errors: { ({name: f'{error:.2e}' for name, error in errors.items()}) }", flush=True)
    limit = max(2 * errors["eager"], 4 * torch.finfo(x.dtype).eps)
    wrong = [name for name in OURS if name in errors and not errors[name] <= limit]
    assert not wrong, f"{wrong}: error above {limit:.1e}; no speed is reported"


def inference(run, name, batch, size, dtype):
    model, x = run.model(name, dtype, merged=True).eval(), run.image(batch, size, dtype)
    shape = "x".join(map(str, x.shape))
    with torch.inference_mode():
        forward = lambda: model(x)  # noqa: E731
        functions = ours(run.gpu, forward, run.tuned)
        functions |= {"eager": plain(forward), "sdpa": plain(forward, **calls.SDPA)}
        check(run.gpu, model, x, functions)
        run.timed(name, shape, dtype, "forward", functions)
        run.timed(name, shape, dtype, "forward", {"mixed": functions["mixed"]}, graphs=False, peaks=False)
        profile(run.gpu, functions["mixed"])


def profile(gpu, call):
    """Prints where a call's time goes, by kernel on the GPU and by function in Python."""
    if gpu.device == "meta":
        return
    in_python = cProfile.Profile()
    in_python.runcall(lambda: [call() for _ in range(3)])
    pstats.Stats(in_python).sort_stats("tottime").print_stats(20)
    torch.cuda.synchronize()
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    print(
        found.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=60), flush=True
    )


def training_step(model, run, x):
    """Forward and backward of ``run``, which is ``model`` or its compiled form, under autocast."""

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(x).float().square().mean()
        loss.backward()

    return step


def training(run):
    name, batch, size = run.training
    model, x = run.model(name, torch.float32, merged=False).train(), run.image(batch, size, torch.float32)
    step = training_step(model, model, x)
    functions = ours(run.gpu, step, run.tuned) | {"eager": plain(step), "sdpa": plain(step, **calls.SDPA)}
    run.timed(name, "x".join(map(str, x.shape)), torch.bfloat16, "training", functions)
    profile(run.gpu, functions["mixed"])


def compiled_form(model):
    return torch.compile(model, dynamic=False)


def compiled(run):
    """Compiles beside other stages, and times when it is this stage's turn."""
    name, batch, size = next(each for each in run.sizes if each[0] == run.args.model)
    with torch.inference_mode(), stage.reported(f"{name} compiled", run.failures):
        model, x = run.model(name, torch.bfloat16, merged=True).eval(), run.image(batch, size, torch.bfloat16)
        rival = model if run.gpu.device == "meta" else compiled_form(model)
        plain(lambda: rival(x), **calls.SDPA)()
        print(f"compiled {name}", flush=True)
        stage.wait_for(run.args.turn)
        mixed = ours(run.gpu, lambda: model(x), run.tuned)["mixed"]
        functions = {"mixed": mixed, "compiled": plain(lambda: rival(x), **calls.SDPA)}
        functions["compiled"]()  # again, alone
        if "compiled" not in run.timed(name, "x".join(map(str, x.shape)), x.dtype, "forward", functions):
            run.failures.append(f"{name} compiled")


def models(run):
    for name, batch, size in run.sizes:
        with stage.reported(name, run.failures):
            inference(run, name, batch, size, torch.bfloat16)
        run.gpu.free()
    with stage.reported("training", run.failures):
        training(run)


def photo(run):
    """A whole photo at once, and the memory it takes."""
    name, batch, size = PHOTO
    with torch.inference_mode():
        model, x = run.model(name, torch.bfloat16, merged=True).eval(), run.image(batch, size, torch.bfloat16)
        mixed = ours(run.gpu, lambda: model(x), run.tuned)["mixed"]
        run.timed(name, "x".join(map(str, x.shape)), x.dtype, "forward", {"mixed": mixed}, graphs=False)


def rest(run):
    with stage.reported("photo", run.failures):
        photo(run)
    run.gpu.free()
    for name, batch, size in run.sizes:
        with stage.reported(f"{name} float32", run.failures):
            inference(run, name, batch, size, torch.float32)
        run.gpu.free()
    with stage.reported("ipt", run.failures):
        ipt(run)


def ipt(run):
    """A batch of IPT's patches, and a training step, beside the same model in PyTorch's own operations."""

    def plain_ipt(call):
        def called():
            with baseline.plain_ipt():
                return call()

        return called

    model = run.model("ipt", torch.bfloat16).eval()
    x = 255 * run.image(64, 48, torch.bfloat16)
    with torch.inference_mode():
        forward = lambda: model(x)  # noqa: E731
        run.timed("ipt", "64x3x48x48", x.dtype, "forward", {"mixed": forward, "eager": plain_ipt(forward)})
    model = run.model("ipt", torch.float32).train()
    x = 255 * run.image(32, 48, torch.float32)
    step = training_step(model, model, x)
    run.timed("ipt", "32x3x48x48", torch.bfloat16, "training", {"mixed": step, "eager": plain_ipt(step)}, graphs=False)


PARTS = {"models": models, "compiled": compiled, "rest": rest}


def main():
    more = {"part": dict(choices=list(PARTS), default="models"), "model": {}, "turn": dict(type=pathlib.Path)}
    args = stage.arguments(__doc__, **more)
    torch.backends.cudnn.benchmark = True
    run = Stage(args)
    PARTS[args.part](run)
    raise SystemExit(bool(run.failures))


if __name__ == "__main__":
    main()
