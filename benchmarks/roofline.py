"""What the processor can do at best: its kind, and the rates that bound every call, measured by roofline.cpp."""

import ctypes
import dataclasses
import functools
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SOURCE = pathlib.Path(__file__).with_suffix(".cpp")
# What /proc/cpuinfo calls the instructions that tell kinds of processors apart, the best first, and their kind.
KINDS = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512f": "avx512",
    "avx2": "avx2",
    "bf16": "neon_bf16",
    "asimd": "neon",
}


def kind():
    """The kind of this processor, by its instructions for floating point: "amx", "avx512_bf16", "avx512", ..."""
    path = pathlib.Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set()
    return next((name for flag, name in KINDS.items() if flag in flags), "generic")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call has to do: FLOPs, bytes read and written, and those FLOPs that are depthwise convolutions."""

    flops: float
    bytes: float
    depthwise: float = 0

    def __mul__(self, times):
        return Work(self.flops * times, self.bytes * times, self.depthwise * times)


@dataclasses.dataclass(frozen=True)
class Rates:
    """FLOP/s of fused multiply-adds of float32 and of products of bfloat16, and bytes/s of a copy (read and written).

    ``bf16`` is that of ``fma`` where the processor has no such product.
    """

    threads: int
    fma: float
    bf16: float
    copy: float

    def seconds(self, work, dtype):
        """The least time of ``work``. Depthwise convolutions are no matrix products: they run as float32."""
        product = self.bf16 if dtype == torch.bfloat16 else self.fma
        return max((work.flops - work.depthwise) / product + work.depthwise / self.fma, work.bytes / self.copy)


@functools.cache
def _probe():
    """The compiled probe. Raises RuntimeError where there is no compiler, or it fails."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"no roofline: there is no compiler {compiler[0]!r}; CXX in the environment names another")
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "roofline.so"
        options = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-o", str(library)]
        done = subprocess.run([*compiler, *options, str(SOURCE)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"no roofline: {SOURCE.name} does not compile: {done.stderr.strip()}")
        probe = ctypes.CDLL(str(library))
    for name in ("fma_rate", "bf16_rate", "copy_rate"):
        getattr(probe, name).restype = ctypes.c_double
    return probe


@functools.cache
def rates(threads):
    """The :class:`Rates` of so many threads at once; the best of several short runs. Raises RuntimeError."""
    fma, bf16, copy = (getattr(_probe(), name)(threads) for name in ("fma_rate", "bf16_rate", "copy_rate"))
    return Rates(threads, fma, bf16 or fma, copy)


def share(work, dtype, seconds):
    """The share of the roofline that a call reaches which does ``work`` in ``seconds``; None without a compiler."""
    try:
        return rates(torch.get_num_threads()).seconds(work, dtype) / seconds
    except RuntimeError:
        return None


class _Depthwise(TorchDispatchMode):
    """Counts the FLOPs of depthwise convolutions, 2 per multiply-accumulate."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[8] > 1:
            self.flops += 2 * out.numel() * math.prod(args[1].shape[1:])
        return out


def depthwise_flops(plain, inputs):
    """FLOPs of depthwise convolutions that ``plain``, a function of PyTorch's own operations, runs on ``inputs``."""
    with _Depthwise() as count, torch.no_grad():
        plain(*(t.to("meta") for t in inputs))
    return count.flops
