"""The least time of a launch, counted from its machine code: issue slots, bytes, matrix work and a warp's own time.

Each kernel is followed through its code (see benchmarks.warp) for some of its blocks. An instruction costs one cycle of
a scheduler and some of a pipe (see benchmarks.sass). The bound is what is longest of these cycles, of the traffic at
the rate of a large copy, and of matrix work at the rate of a large product: all of it would overlap perfectly. Too few
warps cannot do that; the estimate is also no shorter than what waves of blocks take by the latencies of a warp alone.
"""

import collections
import dataclasses
import math
import multiprocessing
import os
import re
import struct

import torch

from . import ahead_of_time, sass
from .warp import Warp, together

SCHEDULERS = 4


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU does at most: bytes/s of a copy (read and written), FLOP/s on the matrix and on the vector units.

    ``clock``: Hz under load; the rest by the data sheet.
    """

    bytes: float
    matrix: float
    vector: float = 60e12
    clock: float = 1.755e9
    multiprocessors: int = 132

    def seconds(self, work):
        """Of work that is not ours: memory or arithmetic, whichever takes longer; the two units do not overlap."""
        return max(work.bytes / self.bytes, work.matrix / self.matrix + work.vector / self.vector)


# Bytes and products as measured with large bf16 products and copies; clocks by the data sheet, under load.
H100 = Ceilings(bytes=3.0e12, matrix=798e12)
H200 = Ceilings(bytes=4.3e12, matrix=790e12, clock=1.98e9)
GPUS = {"H100": H100, "H200": H200}


@dataclasses.dataclass(frozen=True)
class Counted:
    """Of a launch's average block: scheduler cycles of each pipe, summed over its warps, and its resources.

    Of ``pipes``, "issue" is the number of warps' instructions. ``by_name``: {instruction: (pipe, times, cycles)}.
    ``matrix``: cycles of the matrix units, for ``products`` multiply-adds; ``alone``: a warp's cycles where there is no
    other. ``sectors``: of 32 bytes that loads and stores ask the caches for. ``assumed``: branches that hang on loaded
    values, where the shorter way was taken.
    """

    pipes: dict
    by_name: dict
    matrix: float
    products: float
    alone: float
    sectors: float
    assumed: int
    registers: int
    shared: int
    threads: int

    @property
    def blocks_per_multiprocessor(self):
        warps = self.threads // 32
        by_registers = 65536 // (warps * 256 * math.ceil(self.registers * 32 / 256)) if self.registers else 32
        return min(32, 2048 // self.threads, by_registers, (228 << 10) // (self.shared + 1024))


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of a launch, ``seconds``, the longest of issue_s, bytes_s and matrix_s; ``binds`` tells which.

    ``pipe``: which part of the schedulers' work takes issue_s, of the busiest multiprocessor: "issue" itself, "memory"
    (loads, stores and shuffles), "integer", ... ``latency_s``: whole waves of blocks, each as slow as its warps are
    alone; ``slots``: instructions of warps in the launch; ``assumed``: see `Counted`.
    """

    name: str
    seconds: float
    binds: str
    pipe: str
    issue_s: float
    bytes_s: float
    matrix_s: float
    latency_s: float
    registers: int = 0
    shared: int = 0
    blocks_per_sm: int = 0
    waves: float = 0.0
    slots: float = 0.0
    assumed: int = 0

    @property
    def estimate(self):
        """Seconds, with the latencies that too few warps cannot hide."""
        return max(self.seconds, self.latency_s)


def parameters_of(ptx, arguments):
    """{offset in the constant bank: (value, bytes)} of a kernel's arguments; tensors lie far apart."""
    entry = ptx[ptx.index(".entry") :]
    kinds = re.findall(r"\.param \.[a-z](\d+)[^\n]*_param_\d+", entry[: entry.index("{")])
    found, offset = {}, 0x210
    for index, bits in enumerate(kinds):
        value = arguments[index] if index < len(arguments) else 0  # Triton adds some of its own
        if isinstance(value, torch.Tensor):
            value = (index + 1) << 40
        elif isinstance(value, float):
            value = struct.unpack("<I", struct.pack("<f", value))[0]
        size = int(bits) // 8
        offset = -(-offset // size) * size
        found[offset] = (value, size)
        offset += size
    return found


def count(code, registers, shared, threads, grid, parameters):
    """`Counted` of a launch of a kernel, given as [Instruction]; ``parameters``: see `parameters_of`."""
    traces = traces_of(code, parameters, tuple(grid), threads)
    by_name = {}
    matrix = products = 0.0
    share = threads / 32 / len(traces)
    for trace in traces:
        for index, times in trace.counts.items():
            each = code[index]
            active = times - trace.skipped[index]
            pipe, cycles = sass.pipe_of(each, trace.wavefronts[index] / active if index in trace.wavefronts else 1.0)
            name = ".".join((each.name, *each.modifiers))
            _, before, spent = by_name.get(name, (pipe, 0.0, 0.0))
            by_name[name] = pipe, before + times * share, spent + active * cycles * share
            matrix += active * share * sass.matrix_cycles(each)
            products += active * share * sass.products_of(each)
    pipes = collections.Counter()
    for pipe, _, cycles in by_name.values():
        pipes[pipe] += cycles
    pipes["issue"] = sum(times for _, times, _ in by_name.values())
    return Counted(
        dict(pipes), by_name, matrix, products, sum(trace.cycles for trace in traces) / len(traces),
        share * sum(sum(trace.sectors.values()) for trace in traces),
        len(set().union(*(trace.assumed for trace in traces))), registers, shared, threads,
    )  # fmt: skip


def traces_of(code, parameters, grid, threads, most=5):
    """Of warps of some blocks: the first and the last one, or all where those two differ; until two blocks agree."""
    grid = (*grid, 1, 1)[:3]
    total, last = math.prod(grid), threads // 32 - 1
    found, warps = [], sorted({0, last})
    for index in range(min(most, total)):
        place = int((0.5 + 0.618034 * index) % 1 * total)
        block = place % grid[0], place // grid[0] % grid[1], place // grid[0] // grid[1]
        traces = _traces_of_block(code, parameters, block, warps, threads, grid)
        if index == 0 and traces[0].counts != traces[-1].counts:
            warps = list(range(last + 1))
            traces = _traces_of_block(code, parameters, block, warps, threads, grid)
        found += traces
        if index == 1 and all(a.counts == b.counts for a, b in zip(found, traces, strict=False)):
            break
    return found


def _traces_of_block(code, parameters, block, warps, threads, grid):
    shared = {}
    return together([Warp(code, parameters, block, warp, threads, grid, shared) for warp in warps])


def count_launch(kernel, launch):
    """`Counted` of a launch of a kernel that Triton compiled.

    Raises:
        ValueError: it is not compiled for compute capability 9.0, whose costs are known.
    """
    cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    if (target := re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]) not in ("sm_90", "sm_90a"):
        raise ValueError(f"kernel: must be compiled for sm_90 or sm_90a; got {target}")
    threads = math.prod(int(side) for side in re.search(r"\.reqntid (\d+)(?:, (\d+), (\d+))?", ptx).groups("1"))
    registers, _ = ahead_of_time.registers_and_stack(cubin)
    parameters = parameters_of(ptx, ahead_of_time.arguments_of(launch))
    return count(sass.disassemble(cubin), registers, kernel.metadata.shared, threads, launch.grid, parameters)


def bound_of(counted, name, blocks, work, ceilings):
    """`Bound` of a launch that was counted; of ``work`` the bytes are used."""
    pipe = max(counted.pipes, key=counted.pipes.get)
    busiest = math.ceil(blocks / ceilings.multiprocessors) / SCHEDULERS / ceilings.clock
    together = counted.blocks_per_multiprocessor
    waves = blocks / ceilings.multiprocessors / together
    # The matrix units do not keep their clock under load: the rate of a large product counts where it is lower.
    rate = 2 * 512 * SCHEDULERS * ceilings.multiprocessors * ceilings.clock
    slower = max(1.0, rate / ceilings.matrix)
    times = {
        "issue": counted.pipes[pipe] * busiest,
        "bytes": work.bytes / ceilings.bytes,
        "matrix": counted.matrix * busiest * slower,
    }
    binds = max(times, key=times.get)
    return Bound(
        name, times[binds], binds, pipe, times["issue"], times["bytes"], times["matrix"],
        math.ceil(waves) * counted.alone / ceilings.clock, counted.registers, counted.shared, together, waves,
        counted.pipes["issue"] * blocks, counted.assumed,
    )  # fmt: skip


def bound_of_kernel(kernel, launch, ceilings):
    """`Bound` of a launch from the kernel that Triton compiled for it (it has ``asm`` and ``metadata``)."""
    return _bound_of_launch(count_launch(kernel, launch), launch, ceilings)


def _bound_of_launch(counted, launch, ceilings):
    return bound_of(counted, launch.kernel.__name__, math.prod(launch.grid), launch.work, ceilings)


def _bound_of_product(launch, ceilings):
    bytes_s, matrix_s = launch.work.bytes / ceilings.bytes, launch.work.matrix / ceilings.matrix
    binds = "bytes" if bytes_s >= matrix_s else "matrix"
    name = launch.meta.get("name", "matmul")
    return Bound(name, max(bytes_s, matrix_s), binds, "", 0.0, bytes_s, matrix_s, 0.0)


_counted = {}  # by kernel and launch
_waiting = []  # launches for the processes that are forked to count them


def _count_waiting(index):
    return count_launch(ahead_of_time.compiled(_waiting[index]), _waiting[index])


def bounds(launches, ceilings=H100, processes=None):
    """[Bound] of recorded launches, compiled for compute capability 9.0 in parallel, each kernel once.

    Raises:
        RuntimeError: Triton's interpreter is on, so that nothing can be compiled.
    """
    keys = [_launch_key(launch) for launch in launches]
    new = {key: launch for key, launch in zip(keys, launches, strict=True) if key and key not in _counted}
    if new:
        from ipt_fast.kernels._launch import INTERPRETED

        if INTERPRETED:
            raise RuntimeError("TRITON_INTERPRET=1: the interpreter compiles nothing; start without it")
        _waiting[:] = new.values()
        processes = min(len(new), processes or len(os.sched_getaffinity(0)))
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            _counted.update(zip(new, pool.map(_count_waiting, range(len(new)), chunksize=1), strict=True))
    return [
        _bound_of_launch(_counted[key], launch, ceilings) if key else _bound_of_product(launch, ceilings)
        for key, launch in zip(keys, launches, strict=True)
    ]


def counted_of(launch):
    """`Counted` of a launch that `bounds` has seen."""
    return _counted[_launch_key(launch)]


def _launch_key(launch):
    if launch.kernel is None:
        return None
    numbers = [a for a in ahead_of_time.arguments_of(launch) if not isinstance(a, torch.Tensor)]
    return *ahead_of_time.key_of(launch), tuple(launch.grid), tuple(numbers)
