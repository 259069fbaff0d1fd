"""Every operator of the registry against its rivals, forward and with backward, interleaved, medians.

Run by ``python -m benchmarks`` (``make bench``), or by ``pytest benchmarks/test_operators.py``; IPT_FAST_BENCH_CSV
names a CSV that rows are appended to, IPT_FAST_BENCH_COMPILE=1 lets torch.compile take part.
"""

import pytest
import torch

from benchmarks import measure, results, rivals
from benchmarks.registry import CASES


def eager_contenders(case, inputs, direction):
    """{name: call} of plain PyTorch; images channels-last and NCHW."""
    prepare = measure.with_backward if direction == "training" else measure.without_backward
    nchw = [t.contiguous() for t in inputs]
    calls = {}
    for name, rival in case.rivals.items():
        calls[name] = prepare(rival, inputs, case.keywords)
        if any(t.dim() == 4 and t.shape[2] > 8 for t in inputs):
            calls[f"{name} NCHW"] = prepare(rival, nchw, case.keywords)
        if measure.COMPILE:
            calls[f"{name} compiled"] = prepare(case.compiled(name), inputs, case.keywords)
            if direction == "forward":
                module, data = case.baked(name, inputs)
                calls[f"{name} compiled frozen"] = measure.frozen(module.to(inputs[0].dtype), data)
    return calls


def contenders(case, inputs, dtype, direction):
    """({name: call}, {name: why it was left out})."""
    prepare = measure.with_backward if direction == "training" else measure.without_backward
    calls = {"ipt_fast": prepare(case.ours, inputs, case.keywords), **eager_contenders(case, inputs, direction)}
    left_out = {} if measure.COMPILE else {"torch.compile": measure.COMPILE_LEFT_OUT}
    if direction == "forward":
        module, data = case.baked("eager", inputs)
        if data:  # what merges weights has none: it runs in training only
            runtimes, reasons = rivals.contenders(module, data, dtype)
            calls, left_out = calls | runtimes, left_out | reasons
    return calls, left_out


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(benchmark, case, dtype_name, direction):
    torch.manual_seed(0)
    dtype = measure.DTYPES[dtype_name]
    inputs = case.inputs(dtype)
    measure.check_parity(case, inputs, dtype)
    calls, left_out = contenders(case, inputs, dtype, direction)
    calls, wrong = measure.right_ones(calls, dtype)
    left_out |= {f"{name} of {case.name}, {direction}": reason for name, reason in wrong.items()}
    for call in calls.values():  # warm-up
        call()
    rows = measure.interleaved(benchmark, results.group(case.name, dtype_name, direction), calls)
    results.record(rows, case.name, dtype_name, direction, case.work(inputs), left_out)
