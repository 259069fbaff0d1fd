"""kernels.csv: every distinct launch of the models and every distinct call of an operator, beside bounds and rivals.

A launch is one Triton kernel in its tuned configuration; the stage "bounds" adds what it should take at least. A call
is an operator as a graph, on Triton, on CUDA, and as plain PyTorch, eager and with SDPA.
"""

import torch

from benchmarks import ahead_of_time
from benchmarks.gpu import calls, device, stage, tune
from ipt_fast.kernels import _launch

COLUMNS = (
    "date", "commit", "gpu", "torch", "triton", "kind", "name", "shape", "key", "contender", "calls", "median_us",
    "bound_us", "binds", "share_of_bound", "gb_per_s", "registers", "note",
)  # fmt: skip
# Whose gradients are CUDA C++, too; those of the layers are Triton's.
CUDA_BACKWARDS = ("merge_pointwise_backward", "merge_depthwise_backward")


def launches(gpu, table, call, arguments, seen):
    """Rows of the launches that were not timed yet."""
    with _launch.record() as recorded:
        call.on("triton", arguments)()
    for launch in recorded:
        if launch.kernel is None or (identity := (ahead_of_time.key_of(launch), launch.grid)) in seen:
            continue
        seen.add(identity)
        seconds = gpu.seconds({"": gpu.launch(launch)})[""]
        table.add(
            kind="launch", name=launch.kernel.__name__, shape=call.label, contender="triton", key=shown(launch.meta),
            calls=shown(call.counts), median_us=seconds * 1e6, gb_per_s=launch.work.bytes / seconds / 1e9,
        )  # fmt: skip


def operators(gpu, table, call, arguments):
    """Rows of a call on every backend, and of its rivals."""
    names = ["triton", "cuda", "eager"] + (["sdpa"] if call.operator.name in calls.SDPA else [])
    graphs = {}
    for name in names:
        if name in ("triton", "cuda") and (reason := gpu.reason_against(call, name, arguments)):
            print(f"left out: {call.label} on {name}: {reason}", flush=True)
        elif not (name == "cuda" and call.is_backward and call.name not in CUDA_BACKWARDS):
            graphs[name] = gpu.graph(gpu.run(call, name, arguments))
    for name, seconds in gpu.seconds(graphs).items():
        table.add(
            kind="operator", name=call.name, shape=call.shape, key=call.key, contender=name,
            calls=shown(call.counts), median_us=seconds * 1e6,
        )  # fmt: skip


def shown(values):
    return " ".join(f"{name}={value}" for name, value in values.items())


def main():
    args = stage.arguments(__doc__)
    gpu = device.opened(args.rehearse)
    table = stage.Table(args.out / "kernels.csv", COLUMNS, stage.environment(gpu.name))
    failures, seen, taken = [], set(), tune.kept(args, gpu.name)
    chosen = calls.matching(args.only)
    for call in sorted(chosen, key=lambda call: call.is_backward)[: 4 if args.rehearse else None]:
        with torch.no_grad(), _launch.tuning(taken), stage.reported(call.label, failures):
            arguments = gpu.arguments(call)
            operators(gpu, table, call, arguments)
            launches(gpu, table, call, arguments, seen)
            del arguments
        gpu.free()
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
