"""Published models of other people, accelerated, against the same models as they are: inference and training steps.

Run by ``pytest benchmarks/test_relatives.py``; the contenders are those of benchmarks/test_models.py, where plain is
the project's own code.
"""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from benchmarks import measure, relatives, results, rivals, roofline
from benchmarks.relatives import INFERENCE, TRAINING
from benchmarks.test_models import channels_last, check_parity, first, frozen_inference, image, inference, training_step


def by_autocast(model, inputs, dtype, **compiling):
    """A forward of somebody's model whose own code mixes dtypes in ``dtype``."""
    run = inference(model, inputs, torch.float32, **compiling)

    def call():
        with torch.autocast("cpu", dtype):
            return [out.to(dtype) for out in run()]

    return call


def runs(call):
    """Whether a contender runs at all."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def contenders(make, plain, inputs, dtype):
    """({name: call}, {name: why it was left out}) of a model before and after `ipt_fast.accelerate`."""
    accelerated = copy.deepcopy(plain)
    ipt_fast.accelerate(accelerated, verify=False)
    calls, left_out = {}, {}
    last = [channels_last(t) for t in inputs]
    accelerated = accelerated.to(memory_format=torch.channels_last)
    calls["ipt_fast"] = make(accelerated, last, dtype)
    if make is inference:
        calls["ipt_fast frozen"] = frozen_inference(accelerated, last, dtype)
    of_others = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    # Where the project's own code does not run in this dtype.
    of_others = by_autocast if make is inference and not runs(make(plain, inputs, dtype)) else make
    channels_last_plain = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    calls["eager NCHW"] = of_others(plain, inputs, dtype)
    calls["eager"] = of_others(channels_last_plain, last, dtype)
    if measure.COMPILE:
        calls["compiled"] = of_others(channels_last_plain, last, dtype, compiled=True)
        if make is inference:
            calls["compiled frozen"] = of_others(channels_last_plain, last, dtype, compiled=True, freezing=True)
    else:
        left_out["torch.compile"] = measure.COMPILE_LEFT_OUT
    if make is inference:
        runtimes, reasons = rivals.contenders(plain, inputs, dtype)
        calls, left_out = calls | runtimes, left_out | reasons
    return calls, left_out


def without_stochastic_depth(model):
    """A copy in which no branch is dropped: what is dropped would be drawn anew in each call."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def work_of(plain, inputs, dtype):
    """The :class:`roofline.Work` of a forward: weights and images are read once, the output written once."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = plain(*inputs)
    size = sum(t.numel() for t in (*inputs, out, *plain.parameters())) * dtype.itemsize
    return roofline.Work(counter.get_total_flops(), size, 0)


def compare(benchmark, make, name, inputs, dtype_name):
    dtype, direction = measure.DTYPES[dtype_name], "forward" if make is inference else "training"
    plain = relatives.plain(name) if make is inference else without_stochastic_depth(relatives.plain(name))
    calls, left_out = contenders(make, plain, inputs, dtype)
    check_parity(calls, dtype)
    right, wrong = measure.right_ones({name: lambda call=call: first(call()) for name, call in calls.items()}, dtype)
    case = f"{name} {'x'.join(map(str, inputs[0].shape))}"
    left_out |= {f"{rival} of {case}, {direction}": reason for rival, reason in wrong.items()}
    calls = {rival: calls[rival] for rival in right}
    for call in calls.values():  # warm-up
        call()
    rows = measure.interleaved(benchmark, results.group(case, dtype_name, direction), calls)
    results.record(rows, case, dtype_name, direction, work_of(plain, inputs, dtype), left_out)


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize(("name", "size"), INFERENCE)
def test_inference(benchmark, name, size, dtype_name):
    compare(benchmark, inference, name, [image(1, size)], dtype_name)


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize(("name", "batch", "size"), TRAINING)
def test_training_step(benchmark, name, batch, size, dtype_name):
    compare(benchmark, training_step, name, [image(batch, size)], dtype_name)
