"""Whole IPT-V2 models against their rivals, inference and training steps, interleaved, medians.

Run by ``python -m benchmarks``. Rivals are plain PyTorch in the same dtype: eager NCHW and channels-last, SDPA, and
SDPA compiled (for inference with frozen weights), which takes minutes for every model.
"""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from benchmarks import baseline, measure, results

INFERENCE = [("ipt_v2_tiny", 1, 256), ("ipt_v2_small", 1, 256), ("ipt_v2_base", 1, 256)]
TRAINING = [("ipt_v2_small", 2, 128)]
SDPA = {"grid_attention": baseline.sdpa_grid_attention, "grid_attention_layer": baseline.sdpa_grid_layer}


def plain(call, **overrides):
    """``call`` on plain PyTorch."""

    def run():
        with baseline.plain_eager(**overrides):
            return call()

    return run


def inference(model, x, dtype, compiled=False):
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    run = torch.compile(model, dynamic=False) if compiled else model

    def call():
        with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
            return [run(x)]

    return call


def training_step(model, x, dtype, compiled=False):
    """Forward and backward with gradients of all parameters; bfloat16 by autocast."""
    model = copy.deepcopy(model).train()
    run = torch.compile(model, dynamic=False) if compiled else model

    def call():
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = run(x).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    return call


def contenders(make, model, x, dtype):
    """{name: call}; ``make`` is `inference` or `training_step`."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    calls = {
        "ipt_fast": make(*last, dtype),
        "eager NCHW": plain(make(model, x, dtype)),
        "eager": plain(make(*last, dtype)),
        "sdpa": plain(make(*last, dtype), **SDPA),
    }
    if measure.COMPILE:
        calls["sdpa compiled"] = plain(make(*last, dtype, compiled=True), **SDPA)
    return calls


def check_parity(calls, dtype):
    """Raise unless the output, or the loss and all gradients together, are those of plain eager PyTorch.

    The limits are of |ours - eager| / |eager|; a gradient has gone through every layer twice.
    """
    (ours, *our_grads), (eager, *grads) = calls["ipt_fast"](), calls["eager"]()
    limit = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    pairs = [("output", ours.flatten(), eager.flatten(), limit)]
    if grads:
        pairs.append(("gradients", *(torch.cat([g.flatten() for g in each]) for each in (our_grads, grads)), 4 * limit))
    for name, value, truth, allowed in pairs:
        error = ((value.float() - truth.float()).norm() / truth.float().norm()).item()
        assert error < allowed, f"{name}: error {error:.1e} is above {allowed:.1e}; no speed is reported"


def compare(benchmark, make, name, batch, size, dtype_name):
    torch.manual_seed(0)
    dtype, direction = measure.DTYPES[dtype_name], "forward" if make is inference else "training"
    model = ipt_fast.create_model(name, merged=make is inference).eval()
    x = torch.rand(batch, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(x.to("meta"))
    calls = contenders(make, model, x, dtype)
    check_parity(calls, dtype)
    for call in calls.values():  # warm-up and compilation
        call()
    medians = measure.interleaved(benchmark, calls)
    size_of = sum(t.numel() for t in (x, x, *model.parameters())) * dtype.itemsize
    work = (counter.get_total_flops(), size_of)
    results.record(benchmark, f"{name} {batch}x3x{size}x{size}", dtype_name, direction, medians, work)


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize(("name", "batch", "size"), INFERENCE)
def test_inference(benchmark, name, batch, size, dtype_name):
    compare(benchmark, inference, name, batch, size, dtype_name)


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize(("name", "batch", "size"), TRAINING)
def test_training_step(benchmark, name, batch, size, dtype_name):
    compare(benchmark, training_step, name, batch, size, dtype_name)
