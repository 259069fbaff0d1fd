"""Every operator of the registry against its rivals, forward and with backward, interleaved, medians.

Run by ``python -m benchmarks`` (``make bench``), or by ``pytest benchmarks/test_operators.py``; IPT_FAST_BENCH_CSV
names a CSV that rows are appended to.
"""

import pytest
import torch

from benchmarks import measure, results
from benchmarks.registry import CASES


def contenders(case, inputs, direction):
    """{name: call}; the rivals get channels-last and NCHW images, and are compiled too."""
    prepare = measure.with_backward if direction == "training" else measure.without_backward
    nchw = [t.contiguous() for t in inputs]
    calls = {"ipt_fast": prepare(case.ours, inputs, case.keywords)}
    for name, rival in case.rivals.items():
        calls[name] = prepare(rival, inputs, case.keywords)
        if any(t.dim() == 4 and t.shape[2] > 8 for t in inputs):
            calls[f"{name} NCHW"] = prepare(rival, nchw, case.keywords)
        if measure.COMPILE:
            calls[f"{name} compiled"] = prepare(case.compiled(name), inputs, case.keywords)
    return calls


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(benchmark, case, dtype_name, direction):
    torch.manual_seed(0)
    dtype = measure.DTYPES[dtype_name]
    inputs = case.inputs(dtype)
    measure.check_parity(case, inputs, dtype)
    calls = contenders(case, inputs, direction)
    for call in calls.values():  # warm-up and compilation
        call()
        call()
    medians = measure.interleaved(benchmark, calls)
    work = (case.flops(inputs), case.bytes(inputs))
    results.record(benchmark, case.name, dtype_name, direction, medians, work)
