"""Whole IPT-V2 models against their rivals, inference and training steps, interleaved, medians.

Run by ``python -m benchmarks``, or by ``pytest benchmarks/test_models.py``. Rivals are plain PyTorch in the same dtype:
eager NCHW and channels-last, SDPA, and with IPT_FAST_BENCH_COMPILE=1 SDPA compiled, for inference also with frozen
weights, which takes minutes for every model; and for inference OpenVINO and ONNX Runtime.
"""

import copy
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from benchmarks import baseline, measure, results, rivals, roofline

INFERENCE = [
    ("ipt_v2_tiny", 1, 256),
    *(("ipt_v2_small", 1, size) for size in (64, 128, 256)),
    ("ipt_v2_base", 1, 256),
]
TRAINING = [("ipt_v2_small", 2, 128)]
# The best of plain PyTorch: SDPA, and its own norm where that is what a layer has (a bias-free one is none of its own).
SDPA = {
    "grid_attention": baseline.sdpa_grid_attention,
    "grid_attention_layer": baseline.sdpa_grid_layer,
    "focal_attention_layer": baseline.native_focal_layer,
    "leffn_layer": baseline.native_leffn_layer,
}


def plain(call, **overrides):
    """``call`` on plain PyTorch."""

    def run():
        with baseline.plain_eager(**overrides):
            return call()

    return run


def cast(inputs, dtype):
    """Maps in ``dtype``; class labels and the like as they are."""
    return [t.to(dtype) if t.is_floating_point() else t for t in inputs]


def inference(model, inputs, dtype, compiled=False, freezing=False):
    model, inputs = copy.deepcopy(model).to(dtype), cast(inputs, dtype)
    run = torch.compile(model, dynamic=False) if compiled else model

    def call():
        with torch.inference_mode(), torch._inductor.config.patch(freezing=freezing):
            return [run(*inputs)]

    return call


def training_step(model, inputs, dtype, compiled=False):
    """Forward and backward with gradients of all parameters; bfloat16 by autocast."""
    model = copy.deepcopy(model).train()
    run = torch.compile(model, dynamic=False) if compiled else model

    def call():
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = run(*inputs).square().mean()
        loss.backward()
        # A map of one window reads no weight of FCSA's second branch: plain PyTorch leaves their gradients out.
        return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]

    return call


def frozen_inference(model, inputs, dtype):
    """The form of a model for inference that packs its weights once."""
    model, inputs = ipt_fast.freeze(model, dtype), cast(inputs, dtype)

    def call():
        with torch.inference_mode():
            return [model(*inputs)]

    return call


def contenders(make, model, inputs, dtype):
    """({name: call}, {name: why it was left out}); ``make`` is `inference` or `training_step`."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last), [channels_last(t) for t in inputs]
    calls, left_out = {"ipt_fast": make(*last, dtype)}, {}
    if make is inference:
        calls["ipt_fast frozen"] = frozen_inference(*last, dtype)
    calls |= {
        "eager NCHW": plain(make(model, inputs, dtype)),
        "eager": plain(make(*last, dtype)),
        "sdpa": plain(make(*last, dtype), **SDPA),
    }
    if measure.COMPILE:
        calls["sdpa compiled"] = plain(make(*last, dtype, compiled=True), **SDPA)
        if make is inference:
            calls["sdpa compiled frozen"] = plain(make(*last, dtype, compiled=True, freezing=True), **SDPA)
    else:
        left_out["torch.compile"] = measure.COMPILE_LEFT_OUT
    if make is inference:
        runtimes, reasons = rivals.contenders(twin(model), inputs, dtype)
        calls, left_out = calls | runtimes, left_out | reasons
    return calls, left_out


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


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def work_of(model, inputs, dtype):
    """The :class:`roofline.Work` of a forward: weights and images are read once, the output written once."""
    on_meta = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = on_meta(*(t.to("meta") for t in inputs))
    size = sum(t.numel() for t in (inputs[0], out, *model.parameters())) * dtype.itemsize
    return roofline.Work(counter.get_total_flops(), size, roofline.depthwise_flops(on_meta.to_reference(), inputs))


def compare(benchmark, make, model, inputs, case, dtype_name):
    """Time ``make`` of ``model`` beside its rivals; ``case`` is its name in tables."""
    dtype, direction = measure.DTYPES[dtype_name], "forward" if make is inference else "training"
    calls, left_out = contenders(make, model, inputs, dtype)
    check_parity(calls, dtype)
    right, wrong = measure.right_ones({name: lambda call=call: first(call()) for name, call in calls.items()}, dtype)
    calls = {name: calls[name] for name in right}
    left_out |= {f"{name} of {case}, {direction}": reason for name, reason in wrong.items()}
    for call in calls.values():  # warm-up
        call()
    rows = measure.interleaved(benchmark, results.group(case, dtype_name, direction), calls)
    results.record(rows, case, dtype_name, direction, work_of(model, inputs, dtype), left_out)


def first(out):
    """The output, or the loss without the gradients behind it."""
    return out[0] if isinstance(out, list) else out


@functools.cache
def twin(model):
    """Its plain twin, the same one in every test, so that it is exported once."""
    return model.to_reference()


def image(batch, size):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@functools.cache
def preset(name, merged):
    torch.manual_seed(0)
    return ipt_fast.create_model(name, merged=merged).eval()


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize(("name", "batch", "size"), INFERENCE)
def test_inference(benchmark, name, batch, size, dtype_name):
    model, x = preset(name, merged=True), image(batch, size)
    compare(benchmark, inference, model, [x], f"{name} {batch}x3x{size}x{size}", dtype_name)


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize(("name", "batch", "size"), TRAINING)
def test_training_step(benchmark, name, batch, size, dtype_name):
    model, x = preset(name, merged=False), image(batch, size)
    compare(benchmark, training_step, model, [x], f"{name} {batch}x3x{size}x{size}", dtype_name)
