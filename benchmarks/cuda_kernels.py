"""The least time of the CUDA kernels' launches, counted from a built library; no GPU is needed.

The host code of the kernels runs as it is, on CPU tensors, in the library for emulated GPUs (tests.cuda.emulated),
which writes launches down instead of running them; their machine code is that of the real library.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile

import torch
import triton

from ipt_fast.kernels._launch import Work

from . import ahead_of_time, bound, sass

# Maps that a kernel reads or writes; the others' traffic is small beside them.
MAPS = {"leffn_kernel": 2, "focal_gram_kernel": 1, "focal_attend_kernel": 0, "focal_apply_kernel": 2,
        "grid_attention_layer_kernel": 2}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CudaLaunch:
    """``symbol``: the kernel's mangled name; ``parameters``: the bytes of its structure; ``shared``: bytes."""

    symbol: str
    blocks: int
    threads: int
    shared: int
    parameters: bytes

    @property
    def name(self):
        return re.search(r"[a-z_]+_kernel", self.symbol)[0]


def record(call, emulated):
    """[CudaLaunch] that ``call()`` makes; ``emulated``: the library that IPT_FAST_EMULATED_CUDA names."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "launches")
        path.touch()
        os.environ["IPT_FAST_EMULATED_RECORD"] = str(path)
        try:
            call()
        finally:
            del os.environ["IPT_FAST_EMULATED_RECORD"]
        lines = [line.split() for line in path.read_text().splitlines()]
    symbols = {int(line.split()[0], 16): line.split()[-1] for line in _said("nm", "--defined-only", emulated)}
    return [
        CudaLaunch(symbols[int(place, 16)], int(blocks), int(threads), int(shared), bytes.fromhex(parameters))
        for place, blocks, threads, shared, parameters in lines
    ]


def _said(*command):
    return ahead_of_time.said_by(*command).splitlines()


class Library:
    """A built library with the CUDA kernels for compute capability 9.0."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        usage = ahead_of_time.said_by(triton.knobs.nvidia.cuobjdump.path, "-res-usage", self.path)
        self.registers = {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
        self.counted = {}

    def code(self, symbol):
        """[Instruction] of a kernel."""
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-fun", symbol, self.path]
        text = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
        return sass.parse(text)

    def count(self, launch):
        """`bound.Counted` of a launch."""
        if launch not in self.counted:
            words = {0x210 + at: (int.from_bytes(launch.parameters[at : at + 4], "little"), 4)
                     for at in range(0, len(launch.parameters), 4)}  # fmt: skip
            self.counted[launch] = bound.count(
                self.code(launch.symbol), self.registers[launch.symbol], launch.shared, launch.threads,
                (launch.blocks,), words,
            )  # fmt: skip
        return self.counted[launch]

    def bounds(self, launches, works, ceilings=bound.H100):
        """[bound.Bound] of launches, each with its `Work`, of which the bytes are used."""
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            counted = list(pool.map(self.count, launches))
        return [
            bound.bound_of(each, launch.name, launch.blocks, work, ceilings)
            for each, launch, work in zip(counted, launches, works, strict=True)
        ]


def launches_of(operator, arguments):
    """[CudaLaunch] of an operator's forward on arguments of any device, or None where the CUDA kernels cannot run.

    IPT_FAST_EMULATED_CUDA must name the library for emulated GPUs.
    """
    kernel = operator.kernels.get("cuda")
    arguments = [_on_cpu(value) if isinstance(value, torch.Tensor) else value for value in arguments]
    if kernel is None or kernel.check(arguments) is not None:
        return None
    with torch.inference_mode():
        return record(lambda: kernel.forward(*arguments), os.environ["IPT_FAST_EMULATED_CUDA"])


def _on_cpu(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def table(forwards, library, ceilings=bound.H100):
    """Lines, one for each distinct call of ``forwards`` (see predict.forwards_of) that the CUDA kernels take."""
    if "IPT_FAST_EMULATED_CUDA" not in os.environ:
        from tests.cuda import emulated

        os.environ["IPT_FAST_EMULATED_CUDA"] = str(emulated.build())
    groups = {}
    for operator, arguments, launches in forwards:
        key = operator.name, *(tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments)
        groups.setdefault(key, []).append((operator, arguments, launches))
    library = Library(library)
    lines, saved = (
        [f"{'calls':>5} {'us Triton':>9} {'CUDA':>7}  operator; us of each CUDA kernel, and what binds it"],
        0.0,
    )
    for calls in groups.values():
        operator, arguments, launches = calls[0]
        if (ours := launches_of(operator, arguments)) is None:
            continue
        x = arguments[0]
        works = [Work(MAPS.get(each.name, 2) * x.numel() * x.element_size()) for each in ours]
        found = library.bounds(ours, works, ceilings)
        here, there = (sum(each.seconds for each in some) for some in (bound.bounds(launches, ceilings), found))
        saved += len(calls) * max(0.0, here - there)
        parts = ", ".join(f"{1e6 * b.seconds:.1f} ({b.pipe if b.binds == 'issue' else b.binds})" for b in found)
        shape = "x".join(map(str, x.shape))
        lines.append(f"{len(calls):5} {1e6 * here:9.1f} {1e6 * there:7.1f}  {operator.name} {shape}: {parts}")
    return [*lines, f"the faster of both everywhere saves {1e3 * saved:.2f} ms"]
