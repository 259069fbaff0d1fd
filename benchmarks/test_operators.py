"""Every operator of the registry against its rivals, forward and with backward, interleaved, medians.

Run by ``python -m benchmarks`` (``make bench``), or by ``pytest benchmarks/test_operators.py``; IPT_FAST_BENCH_CSV
names a CSV that rows are appended to.
"""

import os
import statistics

import pytest
import torch

from benchmarks import measure, results
from benchmarks.registry import CASES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = int(os.environ.get("IPT_FAST_BENCH_ROUNDS", 7))


@pytest.fixture(scope="session")
def ceilings():
    return {name: measure.ceilings(dtype) for name, dtype in DTYPES.items()}


def contenders(case, inputs, direction):
    """{name: call}; the rivals get channels-last and NCHW images, and are compiled too."""
    prepare = measure.with_backward if direction == "training" else measure.without_backward
    compiled = os.environ.get("IPT_FAST_BENCH_COMPILE", "1") == "1"
    nchw = [t.contiguous() for t in inputs]
    calls = {"ipt_fast": prepare(case.ours, inputs, case.keywords)}
    for name, rival in case.rivals.items():
        calls[name] = prepare(rival, inputs, case.keywords)
        if any(t.dim() == 4 and t.shape[2] > 8 for t in inputs):
            calls[f"{name} NCHW"] = prepare(rival, nchw, case.keywords)
        if compiled:
            calls[f"{name} compiled"] = prepare(case.compiled(name), inputs, case.keywords)
    return calls


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(benchmark, ceilings, case, dtype_name, direction):
    torch.manual_seed(0)
    dtype = DTYPES[dtype_name]
    inputs = case.inputs(dtype)
    measure.check_parity(case, inputs, dtype)
    calls = contenders(case, inputs, direction)
    for call in calls.values():  # warm-up and compilation
        call()
        call()
    times = {name: [] for name in calls}

    def time_rivals():
        for name, call in calls.items():
            if name != "ipt_fast":
                times[name].append(measure.seconds(call))

    def ours():
        times["ipt_fast"].append(measure.seconds(calls["ipt_fast"]))

    benchmark.pedantic(ours, setup=time_rivals, rounds=ROUNDS, iterations=1)
    medians = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info.update({name: value * 1e3 for name, value in medians.items()})
    benchmark.extra_info["times_faster_than_best_rival"] = results.times_faster(medians)

    if path := os.environ.get("IPT_FAST_BENCH_CSV"):
        passes = 3 if direction == "training" else 1  # a backward is counted as two forwards
        work = (passes * case.flops(inputs), passes * case.bytes(inputs))
        results.append_medians(path, case.name, dtype_name, direction, medians, work, ceilings[dtype_name])
