"""Launching kernels: where tile sizes come from, in which precision products run, and how much work a launch is.

Every launch goes through `launch`, so that one place can also record it: for compiling ahead of time, and for
predicting the time of a whole model from the bytes and operations of the schedule as written.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re

import torch
import triton

from ipt_fast._precision import tf32_allowed

# What triton.jit reads when a kernel is defined: run on CPU tensors by NumPy, slowly.
INTERPRETED = triton.knobs.runtime.interpret
CONFIGS = pathlib.Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one launch: bytes of memory traffic, FLOP on the matrix units and on the vector units (2 an FMA)."""

    bytes: int
    matrix: int = 0
    vector: int = 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch. ``kernel`` is None for a matrix product of PyTorch's."""

    kernel: object
    grid: tuple
    arguments: tuple
    meta: dict
    work: Work


_recorder = None  # a list while launches are recorded instead of run
_choice = 0  # of the configurations a kernel has, while they are recorded
_tuning = None  # a `Tuning` while configurations are compared


@contextlib.contextmanager
def record(choice=0):
    """Collects launches as `Launch` instead of running them; outputs stay unwritten, tensors may be on "meta".

    ``choice``: the configuration of every kernel, counted from its default and ending with its last one.
    """
    global _recorder, _choice
    before = _recorder, _choice
    _recorder, _choice = [], choice
    try:
        yield _recorder
    finally:
        _recorder, _choice = before


@dataclasses.dataclass
class Tuning:
    """The configurations that were asked for, {(name, key): candidates}, in order, and those to be taken."""

    asked: dict = dataclasses.field(default_factory=dict)
    taken: dict = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def tuning(taken):
    """Kernels take the configurations ``taken``, {(name, key): configuration}, and else their default ones, whatever
    was measured; the `Tuning` tells what was asked."""
    global _tuning
    before, _tuning = _tuning, Tuning(taken=taken)
    try:
        yield _tuning
    finally:
        _tuning = before


def launch(kernel, grid, *arguments, work, **meta):
    """Run ``kernel[grid](*arguments, **meta)`` on the device of the first tensor; nothing where the grid is empty."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, meta, work))
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **meta)
    else:
        kernel[grid](*arguments, **meta)


def matmul(a, b):
    """a @ b of matrices, by PyTorch: what is a plain product is theirs. fp32 sums; the dtype of ``a``."""
    if _recorder is not None:
        size = (a.numel() + b.numel() + a.shape[0] * b.shape[1]) * a.element_size()
        work = Work(size, matrix=2 * a.shape[0] * a.shape[1] * b.shape[1])
        _recorder.append(Launch(None, (), (a, b), {}, work))
        return a.new_empty(a.shape[0], b.shape[1])
    if a.element_size() == 2 and a.shape[1] > max(a.shape[0], b.shape[1]) and a.device.type != "cpu":
        # Long sums, over pixels, are made in parts, which may be added up in 16 bits unless the result is fp32.
        return torch.mm(a, b, out_dtype=torch.float32).to(a.dtype)
    return torch.mm(a, b)


def path_of(gpu):
    """The file of what was measured on a GPU of this name."""
    return CONFIGS / f"{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.json"


@functools.cache
def measured_on(device):
    """What was measured on this GPU and, where that was not, on others of its compute capability.

    {"kernels": {kernel: {key: configuration}}, "operators": {operator: {key: the faster backend}}}; a file has besides
    {"capability": [major, minor]}.
    """
    own, capability = path_of(torch.cuda.get_device_name(device)), list(torch.cuda.get_device_capability(device))
    merged = {"kernels": {}, "operators": {}}
    for path in sorted(CONFIGS.glob("*.json"), key=lambda path: (path == own, path)):  # its own last
        found = json.loads(path.read_text())
        if found["capability"] == capability:
            for part, values in merged.items():
                for name, by_key in found[part].items():
                    values.setdefault(name, {}).update(by_key)
    return merged


def config(name, key, candidates, device):
    """Tile sizes, warps and stages of a kernel.

    Args:
        name: of the kernel in the tuned files.
        key: a string of what the best tiles depend on (widths, dtype), never of image or batch size.
        candidates: configurations that are correct for ``key``; the first is the safe default.
        device: of the tensors.
    """
    if _tuning is not None:
        _tuning.asked[name, key] = candidates
        taken = _tuning.taken.get((name, key))
        return taken if taken in candidates else candidates[0]
    if _recorder is not None:
        return candidates[min(_choice, len(candidates) - 1)]
    if device.type == "cuda":
        tuned = measured_on(device.index)["kernels"].get(name, {}).get(key)
        if tuned in candidates:
            return tuned
    return candidates[0]


def key_of(x, *widths):
    """The key of a configuration: the dtype of ``x`` and widths."""
    return _key(x.dtype, widths)


@functools.cache
def _key(dtype, widths):
    return "-".join([str(dtype).removeprefix("torch."), *map(str, widths)])


def precision(x):
    """``input_precision`` of tl.dot for products of ``x``: true fp32, unless PyTorch's own switch allows TF32."""
    return "tf32" if x.dtype == torch.float32 and tf32_allowed() else "ieee"


def cdiv(a, b):
    """a / b rounded up, of integers; Triton's own is slow on the host."""
    return -(-a // b)


def power_of_2(n):
    """The least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def block_of(width, least=16):
    """The power of two that holds ``width``: a tile's side."""
    return max(least, power_of_2(width))
