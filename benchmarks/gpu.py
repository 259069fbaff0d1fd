"""``python -m benchmarks.gpu``: operators, models and training steps on an NVIDIA GPU, beside their rivals.

Every contender is captured in a CUDA graph where it can be, so that launching costs nobody anything; contenders are
timed by CUDA events in turns, with the second-level cache flushed before every call; medians. A row is written as soon
as its case is done. Compiled rivals come last: compiling takes most of the time.
"""

import argparse
import copy
import csv
import dataclasses
import datetime
import pathlib
import statistics
import subprocess
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from benchmarks import baseline, predict, registry
from ipt_fast.kernels._launch import Work

COLUMNS = (
    "date", "commit", "gpu", "torch", "triton", "case", "dtype", "direction", "contender", "median_ms", "times_faster",
    "predicted_ms", "gb_per_s", "tflop_per_s", "share_of_ceiling", "peak_gib", "note",
)  # fmt: skip
SDPA = {"grid_attention": baseline.sdpa_grid_attention, "grid_attention_layer": baseline.sdpa_grid_layer}
MODELS = [("ipt_v2_base", 1, 512), ("ipt_v2_small", 1, 512)]
TRAINING = ("ipt_v2_base", 16, 128)
PHOTO = ("ipt_v2_base", 2160, 3840)
GIB = 2**30


def environment():
    import triton

    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit or "unknown",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def captured(call):
    """``call`` as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.out = out  # lives as long as the graph
    return graph.replay


class Timer:
    """Medians of calls in turns, each on a cold second-level cache."""

    def __init__(self):
        self.cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def once(self, call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3

    def medians(self, calls, rounds=15):
        times = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self.once(call))
        return {name: statistics.median(values) for name, values in times.items()}


def ceilings(timer):
    """Of this GPU in this run: a copy and a bf16 matrix product; the vector units by an H200's data sheet."""
    source = torch.rand(256 << 20, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.rand(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = timer.medians({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, rounds=7)
    return predict.Ceilings(
        bytes=2 * source.numel() * 4 / found["copy"],
        matrix=2 * 8192**3 / found["product"],
        vector=predict.H200.vector,
    )


class Record:
    """Appends rows; prints them."""

    def __init__(self, folder, timer):
        self.path = folder / "gpu.csv"
        self.timer, self.ceilings, self.shared = timer, ceilings(timer), environment()
        print(f"{self.shared['gpu']}: {self.ceilings}", flush=True)

    def case(self, label, dtype, direction, calls, work=None, peaks=None, notes=None, least=None):
        """Time ``calls``, {contender: call}; ``work`` is what `predict.work_of` answers for "ipt_fast".

        ``least``: the `Work` that nobody can do without, every tensor read or written once and the formula's FLOP.
        """
        medians = self.timer.medians(calls)
        ceilings = self.ceilings
        if dtype == "float32":  # not on the matrix units
            ceilings = dataclasses.replace(ceilings, matrix=ceilings.vector)
        rivals = [value for name, value in medians.items() if not name.startswith("ipt_fast")]
        rows = []
        for name, median in medians.items():
            row = dict.fromkeys(COLUMNS, "") | self.shared | {"case": label, "dtype": dtype, "direction": direction}
            row |= {"contender": name, "median_ms": f"{median * 1e3:.4f}", "note": (notes or {}).get(name, "")}
            if peaks:
                row["peak_gib"] = f"{peaks[name]:.3f}"
            if name.startswith("ipt_fast"):
                row["times_faster"] = f"{min(rivals) / median:.2f}" if rivals else ""
                if work:
                    predicted = sum(ceilings.seconds(each) for _, each in work)
                    row["predicted_ms"] = f"{predicted * 1e3:.4f}"
                if least:
                    row["share_of_ceiling"] = f"{ceilings.seconds(least) / median:.3f}"
                    row["gb_per_s"] = f"{least.bytes / median / 1e9:.0f}"
                    row["tflop_per_s"] = f"{(least.matrix + least.vector) / median / 1e12:.1f}"
            rows.append(row)
        self.write(rows)

    def write(self, rows):
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            shown = ("case", "dtype", "direction", "contender", "median_ms", "times_faster", "predicted_ms", "peak_gib")
            print("  ".join(row[name] for name in shown), flush=True)


def with_capture(calls):
    """Every call as a graph. One that cannot be captured stays as it is, and its note says why; one that fails goes."""
    found, notes = {}, {}
    for name, call in calls.items():
        try:
            found[name] = captured(call)
        except Exception as error:  # a rival's own limits are not ours
            torch.cuda.synchronize()
            try:
                call()
            except Exception as failure:
                if name == "ipt_fast":
                    raise
                print(f"left out: {name}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
                continue
            found[name], notes[name] = call, f"not captured: {type(error).__name__}"
    return found, notes


def least_work(case, inputs, call):
    """Bytes of the inputs and the output, once each, and the FLOP of the operator's formula."""
    with FlopCounterMode(display=False) as counter:
        out = call()
    values = sum(t.numel() * t.element_size() for t in [*inputs, out])
    return Work(values, matrix=counter.get_total_flops())


def operators(record, dtype, compiled):
    for case in registry.GPU_CASES:
        inputs = [t.cuda() for t in case.inputs(dtype)]
        ours = lambda case=case, inputs=inputs: case.ours(*inputs, **case.keywords)  # noqa: E731
        rivals = {n: lambda f=f, c=case, i=inputs: f(*i, **c.keywords) for n, f in case.rivals.items()}
        if compiled:
            options = dict(dynamic=False, mode="max-autotune-no-cudagraphs")
            function = torch.compile(case.rivals["eager"], **options)
            rivals["eager compiled"] = lambda f=function, c=case, i=inputs: f(*i, **c.keywords)
        with torch.inference_mode():
            both = {"ipt_fast": on("triton", ours), "ipt_fast cuda": on("cuda", ours)}
            try:
                both["ipt_fast cuda"]()
            except RuntimeError as reason:
                if "backend 'cuda' cannot run" not in str(reason):  # it can, and failed
                    raise
                print(f"left out: {reason}", flush=True)
                del both["ipt_fast cuda"]
            calls, notes = with_capture({**both, **rivals})
            record.case(
                case.name, str(dtype).removeprefix("torch."), "forward", calls, predict.work_of(ours), None, notes,
                least_work(case, inputs, ours),
            )  # fmt: skip


def on(backend, call):
    def run():
        with ipt_fast.use_backend(backend):
            return call()

    return run


def plain(call, **overrides):
    def run():
        with baseline.plain_eager(**overrides):
            return call()

    return run


def model_on_gpu(name, dtype, merged=None):
    torch.manual_seed(0)
    options = {} if merged is None else {"merged": merged}
    model = ipt_fast.create_model(name, **options).cuda().to(dtype)
    return model.to(memory_format=torch.channels_last)


def models(record, dtype, compiled):
    for name, batch, size in MODELS:
        model = model_on_gpu(name, dtype, merged=True).eval()
        nchw = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        x = torch.rand(batch, 3, size, size, device="cuda", dtype=dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            calls = {
                "ipt_fast": lambda: model(last),  # noqa: B023, used before the next turn
                "eager NCHW": plain(lambda: nchw(x)),  # noqa: B023
                "eager": plain(lambda: model(last)),  # noqa: B023
                "sdpa": plain(lambda: model(last), **SDPA),  # noqa: B023
            }
            if compiled:
                run = torch.compile(copy.deepcopy(model), dynamic=False, mode="max-autotune-no-cudagraphs")
                calls["sdpa compiled"] = plain(lambda: run(last), **SDPA)  # noqa: B023
            ours, rival = calls["ipt_fast"]().float(), calls["eager"]().float()
            error = (ours - rival).abs().max() / rival.abs().max()
            assert error < (1e-4 if dtype == torch.float32 else 0.05), (
                f"{name}: error {error:.1e}; no speed is reported"
            )
            work = predict.work_of(calls["ipt_fast"])
            calls, notes = with_capture(calls)
            label = f"{name} {batch}x3x{size}x{size}"
            record.case(label, str(dtype).removeprefix("torch."), "forward", calls, work, None, notes)


def training(record, compiled):
    name, batch, size = TRAINING
    model = model_on_gpu(name, torch.float32, merged=False).train()
    x = torch.rand(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)

    step = training_step(model, model, x)
    calls = {"ipt_fast": step, "eager": plain(step), "sdpa": plain(step, **SDPA)}
    if compiled:
        calls["sdpa compiled"] = plain(training_step(model, torch.compile(model, dynamic=False), x), **SDPA)
    record.case(f"{name} {batch}x3x{size}x{size}", "bfloat16", "training", calls, None, peaks_of(calls, model))


def training_step(model, run, x):
    """Forward and backward of ``run``, which is ``model`` or its compiled form, under autocast."""

    def call():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(x).square().mean()
        loss.backward()

    return call


def peaks_of(calls, model):
    """{contender: GiB of GPU memory that a call has allocated at most}."""
    peaks = {}
    for contender, call in calls.items():
        call()
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        call()
        peaks[contender] = torch.cuda.max_memory_allocated() / GIB
    return peaks


def ipt(record):
    """The tiles of IPT, and a training step, beside the same model in PyTorch's own operations."""

    def plain_ipt(call):
        def run():
            with baseline.plain_ipt():
                return call()

        return run

    model = model_on_gpu("ipt", torch.bfloat16).eval()
    x = (255 * torch.rand(64, 3, 48, 48, device="cuda")).bfloat16()
    with torch.inference_mode():
        calls = {"ipt_fast": lambda: model(x), "eager": plain_ipt(lambda: model(x))}
        ours, rival = (call().float() for call in calls.values())
        error = (ours - rival).abs().max() / rival.abs().max()
        assert error < 0.05, f"ipt: error {error:.1e}; no speed is reported"
        calls, notes = with_capture(calls)
        record.case("ipt 64x3x48x48", "bfloat16", "forward", calls, None, None, notes)
    model = model_on_gpu("ipt", torch.float32).train()
    x = 255 * torch.rand(32, 3, 48, 48, device="cuda")
    step = training_step(model, model, x)
    calls = {"ipt_fast": step, "eager": plain_ipt(step)}
    record.case("ipt 32x3x48x48", "bfloat16", "training", calls, None, peaks_of(calls, model))


def photo(record):
    name, height, width = PHOTO
    model = model_on_gpu(name, torch.bfloat16, merged=True).eval()
    x = torch.rand(1, 3, height, width, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model(x)
        peak = torch.cuda.max_memory_allocated() / GIB
        label = f"{name} 1x3x{height}x{width}"
        record.case(label, "bfloat16", "forward", {"ipt_fast": lambda: model(x)}, None, {"ipt_fast": peak})


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of gpu.csv")
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing new after so long")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no NVIDIA GPU")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # as products: everybody's float32 is float32
    began = time.monotonic()
    record = Record(args.out, Timer())
    half, full = torch.bfloat16, torch.float32
    steps = [
        ("models bf16", lambda: models(record, half, False)),
        ("operators bf16", lambda: operators(record, half, False)),
        ("training", lambda: training(record, False)),
        ("ipt", lambda: ipt(record)),
        ("photo", lambda: photo(record)),
        ("models fp32", lambda: models(record, full, False)),
        ("operators fp32", lambda: operators(record, full, False)),
        ("models bf16 with the compiled rival", lambda: models(record, half, True)),
        ("training with the compiled rival", lambda: training(record, True)),
        ("operators bf16 with the compiled rival", lambda: operators(record, half, True)),
    ]
    failed = []
    for name, step in steps:
        if time.monotonic() - began > args.seconds:
            print(f"left out for want of time: {name}", flush=True)
            continue
        print(f"== {name}", flush=True)
        try:
            step()
        except Exception as error:  # the other steps' figures are still wanted
            failed.append(name)
            print(f"FAILED: {name}: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
