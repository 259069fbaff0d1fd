"""Interleaved timing in one process, each contender a row of pytest-benchmark's table, and parity before speed."""

import copy
import os
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = int(os.environ.get("IPT_FAST_BENCH_ROUNDS", 7))
COMPILE = os.environ.get("IPT_FAST_BENCH_COMPILE", "0") == "1"  # it takes minutes a case
COMPILE_LEFT_OUT = "it takes minutes a case (IPT_FAST_BENCH_COMPILE=1)"
PAUSE = 0.003  # seconds before a contender's turn, until the threads of the one before sleep
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


def frozen(module, inputs):
    """A call of ``module`` compiled with its weights frozen, for the sizes of ``inputs``."""
    run = torch.compile(module, dynamic=False)

    def call():
        with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
            return run(*inputs)

    return call


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def right_ones(calls, dtype):
    """(those of ``calls`` that compute what "ipt_fast" does, {name: why another one is left out}).

    Loosely: other orders of sums and other roundings are allowed. What a rival loses that way is no speed.
    """
    exact = as_one(calls["ipt_fast"]()).double()
    limit = 1e-3 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    right, left_out = {}, {}
    for name, call in calls.items():
        error = ((as_one(call()).double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()
        if error <= limit:
            right[name] = call
        else:
            left_out[name] = f"it computes something else: in {dtype} its error is {error:.1e}, above {limit:.1e}"
    assert "ipt_fast" in right, f"ipt_fast: {left_out['ipt_fast']}"  # such as NaN
    return right, left_out


def interleaved(benchmark, group, calls, rounds=ROUNDS):
    """{name: pytest-benchmark's record} of ``calls``, which take turns; all are rows of the table ``group``.

    With --benchmark-disable each is called once, and nothing is returned.
    """
    benchmark._mode = "interleaved"  # it counts as used
    if benchmark.disabled:
        for call in calls.values():
            call()
        return {}
    runners = {name: benchmark._make_runner(call, (), {}) for name, call in calls.items()}
    rows = {name: _row(benchmark, group, name) for name in calls}
    for _ in range(rounds):
        for name, runner in runners.items():
            time.sleep(PAUSE)
            duration, _ = runner(None)
            rows[name].update(duration)
    return rows


def _row(benchmark, group, name):
    """A record of its own in pytest-benchmark's session, which is made for one of a test."""
    fixture = copy.copy(benchmark)
    fixture.name, fixture.fullname, fixture.group = name, f"{benchmark.fullname}::{name}", group
    fixture.extra_info = {}
    # A case holds functions, which no JSON does.
    fixture.params = {
        key: value if isinstance(value, (str, int)) else str(value) for key, value in fixture.params.items()
    }
    return fixture._make_stats(iterations=1)


def memory_is_tuned():
    """Whether glibc keeps large blocks instead of mapping and unmapping them (see ``TUNED_ALLOCATOR``)."""
    return all(os.environ.get(name) == value for name, value in TUNED_ALLOCATOR.items())
