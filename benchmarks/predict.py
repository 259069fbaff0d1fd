"""The time a call should take on a GPU, counted from the launches it makes, before anything is run.

``python -m benchmarks.predict`` prints the models of the targets; with TRITON_INTERPRET=1 it needs no GPU.
"""

import argparse
import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ipt_fast

CONVOLUTIONS = {torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU does at most: bytes/s of a copy (read and written), FLOP/s on the matrix and on the vector units."""

    bytes: float
    matrix: float
    vector: float

    def seconds(self, work):
        """Of one launch: memory or arithmetic, whichever takes longer; the two units do not overlap."""
        return max(work.bytes / self.bytes, work.matrix / self.matrix + work.vector / self.vector)


# Measured with large bf16 products and copies; the vector units by the data sheet.
H200 = Ceilings(bytes=4.3e12, matrix=790e12, vector=60e12)


class _Convolutions(TorchDispatchMode):
    """Counts the convolutions that stay PyTorch's."""

    def __init__(self):
        super().__init__()
        self.work = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in CONVOLUTIONS:
            from ipt_fast.kernels._launch import Work

            x, weight = args[:2]
            size = sum(t.numel() * t.element_size() for t in (x, weight, out))
            self.work.append(Work(size, matrix=2 * out.numel() * weight[0].numel()))
        return out


def work_of(call):
    """[(name, Work)] of the launches ``call()`` makes on the Triton backend; its kernels do not run."""
    from ipt_fast.kernels import _launch

    with _launch.record() as launches, _Convolutions() as convolutions, ipt_fast.use_backend("triton"):
        call()
    named = [(launch.kernel.__name__ if launch.kernel else "matmul", launch.work) for launch in launches]
    return named + [("convolution", work) for work in convolutions.work]


def predict(call, ceilings=H200):
    """{kernel: seconds} for ``call()``, which must end in the sum if every launch reached its ceiling."""
    seconds = {}
    for name, work in work_of(call):
        seconds[name] = seconds.get(name, 0.0) + ceilings.seconds(work)
    return seconds


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the image")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("ipt_v2_small", "ipt_v2_base"):
        model = (
            ipt_fast.create_model(name, merged=True).to(device, torch.bfloat16).to(memory_format=torch.channels_last)
        )
        x = torch.rand(1, 3, args.size, args.size, device=device, dtype=torch.bfloat16)
        with torch.inference_mode():
            found = predict(lambda: model(x))  # noqa: B023, called at once
        print(f"{name} 1x3x{args.size}x{args.size} bfloat16: {1e3 * sum(found.values()):.2f} ms on an H200")
        for kernel, seconds in sorted(found.items(), key=lambda item: -item[1]):
            print(f"  {1e3 * seconds:7.3f} ms  {kernel}")


if __name__ == "__main__":
    main()
