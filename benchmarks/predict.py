"""The least time a call should take on a GPU, counted from the launches it makes; nothing is run, no GPU is needed.

``python -m benchmarks.predict`` prints the models of the targets, kernel by kernel. PyTorch's own small operations
(copies, additions, shuffles of pixels) are not counted; its products and convolutions are, by bytes and FLOP.
"""

import argparse
import contextlib
import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ipt_fast
from benchmarks import cuda_kernels
from benchmarks.bound import GPUS, H100, H200, Bound, Ceilings, bound_of_kernel, bounds, counted_of
from ipt_fast.ops._operator import OPERATORS

__all__ = ["H100", "H200", "Bound", "Ceilings", "bound_of_kernel", "bounds", "predict", "recorded", "work_of"]

CONVOLUTIONS = {torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default}


class _OnTriton(TorchDispatchMode):
    """Runs the package's operators by the host code of their Triton kernels, on tensors of any device, also "meta".

    ``launches``: gets a `Launch` for every convolution that stays PyTorch's. ``forwards``: [(operator, its arguments,
    its launches)] in the end.
    """

    def __init__(self, launches):
        super().__init__()
        self.launches, self.forwards = launches, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ipt_fast":
            return self._operator(function._opname, args)
        out = function(*args, **(kwargs or {}))
        if function in CONVOLUTIONS:
            self._convolution(*args[:2], out, 1)
        elif function is torch.ops.aten.convolution_backward.default:
            self._convolution(args[1], args[2], args[0], sum(args[-1][:2]))
        return out

    def _operator(self, name, args):
        if name in OPERATORS:
            first = len(self.launches)
            out = OPERATORS[name].kernels["triton"].forward(*args)
            self.forwards.append((OPERATORS[name], args, self.launches[first:]))
            return out
        operator = OPERATORS[name.removesuffix("_backward")]
        grad, *inputs, _ = args
        grads = operator.kernels["triton"].backward(grad, *inputs)
        values = dict(zip(operator.arguments, inputs, strict=True))
        named = zip(operator.tensors, grads, strict=True)
        return tuple(operator._gradient_like(grad, tensor, values[tensor], value) for tensor, value in named)

    def _convolution(self, x, weight, out, products):
        from ipt_fast.kernels._launch import Launch, Work

        size = sum(t.numel() * t.element_size() for t in (x, weight, out))
        work = Work(size * products, matrix=2 * products * out.numel() * weight[0].numel())
        self.launches.append(Launch(None, (), (x, weight), {"name": "convolution"}, work))


def recorded(call):
    """[Launch] that ``call()`` makes on the Triton backend; its kernels do not run, its tensors may be on "meta"."""
    from ipt_fast.kernels import _launch

    with _launch.record() as launches, _OnTriton(launches):
        call()
    return launches


def forwards_of(call):
    """[(operator, its arguments, its launches on the Triton backend)] of ``call()``; see `recorded`."""
    from ipt_fast.kernels import _launch

    with _launch.record() as launches, _OnTriton(launches) as mode:
        call()
    return mode.forwards


def work_of(call):
    """[(name, Work)] of the launches ``call()`` makes on the Triton backend; its kernels do not run."""
    return [(_name(launch), launch.work) for launch in recorded(call)]


def _name(launch):
    return launch.kernel.__name__ if launch.kernel else launch.meta.get("name", "matmul")


def predict(call, ceilings=H100):
    """{kernel: seconds} for ``call()``, which must end in the sum if every launch reached its bound."""
    seconds = {}
    for bound in bounds(recorded(call), ceilings):
        seconds[bound.name] = seconds.get(bound.name, 0.0) + bound.seconds
    return seconds


# ---- the models of the targets ------------------------------------------------------------------------------------


def forward_of(name, batch, size, dtype=torch.bfloat16):
    """A call that runs a merged model on an image without memory."""
    with torch.device("meta"):
        model = ipt_fast.create_model(name, merged=True).to(dtype).to(memory_format=torch.channels_last).eval()
        x = torch.empty(batch, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: model(x))


def training_of(name, batch, size, dtype=torch.bfloat16):
    """A call that runs a model forward and backward; its weights have ``dtype`` already, as autocast makes them."""
    with torch.device("meta"):
        model = ipt_fast.create_model(name, merged=False).to(dtype).to(memory_format=torch.channels_last).train()
        x = torch.empty(batch, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: model(x).square().mean().backward()


def table(launches, found, instructions=0):
    """Lines, one for each kernel of `Launch` es and their `Bound` s: the most expensive first.

    Microseconds a call: the bound, its three parts, and blocks by latency ("alone"). "slots": instructions of a lane
    for each value of the memory traffic. ``instructions``: so many of a kernel's are listed, of all warps of a block.
    """
    groups = {}
    for launch, bound in zip(launches, found, strict=True):
        shape = "x".join(str(side) for side in launch.arguments[0].shape)
        groups.setdefault((bound, shape), []).append(launch)
    lines = [
        f"{'ms':>7} {'calls':>5} {'us':>6} {'issue':>6} {'bytes':>6} {'matrix':>6} {'alone':>6}  {'binds':17} "
        f"{'slots':>5} {'regs':>4} {'KiB':>4} {'waves':>6}  kernel"
    ]
    for (bound, shape), calls in sorted(groups.items(), key=lambda item: -item[0][0].seconds * len(item[1])):
        values = calls[0].work.bytes / calls[0].arguments[0].element_size()
        parts = (bound.seconds, bound.issue_s, bound.bytes_s, bound.matrix_s, bound.latency_s)
        binds = f"issue ({bound.pipe})" if bound.binds == "issue" and bound.pipe != "issue" else bound.binds
        lines.append(
            f"{1e3 * bound.seconds * len(calls):7.3f} {len(calls):5} {' '.join(f'{1e6 * part:6.1f}' for part in parts)}"
            f"  {binds:17} {32 * bound.slots / values:5.1f} {bound.registers:4} {bound.shared / 1024:4.0f} "
            f"{bound.waves:6.2f}  {bound.name} {shape}"
        )
        by_name = counted_of(calls[0]).by_name if instructions and calls[0].kernel else {}
        for name, (pipe, times, cycles) in sorted(by_name.items(), key=lambda item: -item[1][2])[:instructions]:
            lines.append(f"{cycles:16.0f} cycles of {pipe}, {times:.0f} times: {name}")
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--size", type=int, help="side of the image (default 512, 128 with --train)")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="whose ceilings (default: %(default)s)")
    parser.add_argument("--model", action="append", help="default: ipt_v2_small and ipt_v2_base")
    parser.add_argument("--train", action="store_true", help="forward and backward of 16 images by ipt_v2_base")
    parser.add_argument("--kernel", help="regular expression: only these, with the instructions that cost most")
    parser.add_argument("--cuda", metavar="LIBRARY", help="the built CUDA kernels: tells where they beat Triton's")
    args = parser.parse_args()
    batch, size = (16, args.size or 128) if args.train else (1, args.size or 512)
    names = args.model or (["ipt_v2_base"] if args.train else ["ipt_v2_small", "ipt_v2_base"])
    for name in names:
        launches = recorded((training_of if args.train else forward_of)(name, batch, size))
        if args.kernel:
            launches = [each for each in launches if re.search(args.kernel, _name(each))]
        found = bounds(launches, GPUS[args.gpu])
        total, estimate = (1e3 * sum(getattr(each, part) for each in found) for part in ("seconds", "estimate"))
        what = f"{name} {batch}x3x{size}x{size} bfloat16, {'forward and backward' if args.train else 'forward'}"
        print(f"{what}: at least {total:.2f} ms on an {args.gpu}, with latencies {estimate:.2f}")
        print("\n".join(table(launches, found, instructions=12 if args.kernel else 0)))
        if args.cuda:
            print("\n".join(cuda_kernels.table(forwards_of(forward_of(name, batch, size)), args.cuda, GPUS[args.gpu])))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
