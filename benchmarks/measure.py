"""Interleaved timing in one process, parity before speed, and ceilings measured in the same run."""

import functools
import os
import statistics
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = int(os.environ.get("IPT_FAST_BENCH_ROUNDS", 7))
COMPILE = os.environ.get("IPT_FAST_BENCH_COMPILE", "1") == "1"
# Keeps glibc from mapping and unmapping every large temporary: the honest rival.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "1073741824",
}
# Floor of the parity check, in units in the last place of the tested dtype.
FLOOR_ULPS = 4


def relative_error(out, exact):
    return ((out.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


def as_one(out):
    """The output; several outputs as one tensor, one behind the other."""
    return out if isinstance(out, torch.Tensor) else torch.cat([each.flatten() for each in out])


def check_parity(case, inputs, dtype):
    """Raise unless the operator's error against float64 is at most twice the plain formula's (or a few ulps)."""
    with torch.no_grad():
        exact = as_one(case.rivals["eager"](*(t.double() for t in inputs), **case.keywords))
        error = relative_error(as_one(case.ours(*inputs, **case.keywords)), exact)
        plain = relative_error(as_one(case.rivals["eager"](*inputs, **case.keywords)), exact)
    limit = max(2 * plain, FLOOR_ULPS * torch.finfo(dtype).eps)
    assert error <= limit, f"{case.name} in {dtype}: error {error:.2e} is above {limit:.2e}; no speed is reported"


def with_backward(function, inputs, keywords):
    """A call that differentiates ``function`` with respect to all inputs; the same upstream gradient every time."""
    inputs = [t.detach().requires_grad_() for t in inputs]

    def results():
        out = function(*inputs, **keywords)
        return out if isinstance(out, tuple) else (out,)

    upstream = [torch.ones_like(out) for out in results()]
    return lambda: torch.autograd.grad(results(), inputs, upstream)


def without_backward(function, inputs, keywords):
    def call():
        with torch.inference_mode():
            return function(*inputs, **keywords)

    return call


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(benchmark, calls):
    """{name: median seconds} of ``calls``; in every round the rivals run right before "ipt_fast"."""
    times = {name: [] for name in calls}

    def time_rivals():
        for name, call in calls.items():
            if name != "ipt_fast":
                times[name].append(seconds(call))

    def ours():
        times["ipt_fast"].append(seconds(calls["ipt_fast"]))

    benchmark.pedantic(ours, setup=time_rivals, rounds=ROUNDS, iterations=1)
    return {name: statistics.median(values) for name, values in times.items()}


@functools.cache
def ceilings(dtype):
    """(FLOP/s of a large matrix product in ``dtype``, bytes/s of a copy that does not fit the caches)."""
    a, b = torch.rand(2048, 512).to(dtype), torch.rand(512, 2048).to(dtype)
    source = torch.rand(32 * 2**20)
    target = torch.empty_like(source)
    product, copy = (lambda: a @ b), (lambda: target.copy_(source))
    rounds = [(seconds(product), seconds(copy)) for _ in range(7)][2:]
    product_time, copy_time = (statistics.median(column) for column in zip(*rounds, strict=True))
    return 2 * 2048 * 512 * 2048 / product_time, 2 * source.numel() * 4 / copy_time


def memory_is_tuned():
    """Whether glibc keeps large blocks instead of mapping and unmapping them (see ``TUNED_ALLOCATOR``)."""
    return all(os.environ.get(name) == value for name, value in TUNED_ALLOCATOR.items())
