"""Channel attention of values as large and as small as their dtype holds: no worse than the reference."""

import pytest
import torch

from tests.ops.cases import CALLS, assert_within_rule, baseline, build, exact
from tests.ops.test_parity import on_backend, runnable

ATTENTION = [call for call in CALLS if "channel_attention" in call and "odd" not in call]
LAYER = ["focal_attention_layer"]
SCALES = [1e-44, 1e-38, 1e-30, 1e-20, 1e-13, 1e-9, 1e9, 1e17, 1e18, 5e18, 1e20, 1e25, 1e37]


def maps(tensors):
    """q, k and v: (batch, channels, height, width) of views, or of the channels that become them."""
    if "q" in tensors:
        return [tensors[name] for name in "qkv"]
    return tensors["qkv"].chunk(3, dim=1) if "qkv" in tensors else tensors["qkv_weight"].chunk(3)


def scaled(part, tensors, scale):
    """Multiplies ``part`` of the float64 ``tensors`` in place."""
    q, k, v = maps(tensors)
    if part == "all":
        for each in (q, k, v):
            each *= scale
    elif part == "q":
        q *= scale
    elif part == "v":
        v *= scale
    elif part == "a channel":
        q[:, 1] *= scale
        k[:, 0] *= scale
    elif part == "mixed":
        q[:, ::2] *= scale
        q[:, 1::2] /= scale
        k[:, 1::2] *= scale
    elif part == "a pixel":
        q[..., 3, 4] *= scale
        k[..., 3, 5] *= scale
    else:
        tensors[part] *= scale


def check(call, dtype, part, shape=(1, 7, 9), scales=SCALES):
    backends, compared = None, 0
    for scale in scales:
        torch.manual_seed(3)
        operator, tensors, options = build(call, shape)
        scaled(part, tensors, scale)
        most = torch.finfo(dtype).max
        tensors = {name: value.clamp(-most, most).to(dtype) for name, value in tensors.items()}
        grad = torch.randn_like(next(iter(tensors.values())))[:, :6] if "qkv" in tensors else None
        grad = torch.randn(tensors["x" if "x" in tensors else "v"].shape).to(dtype) if grad is None else grad
        truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
        backends = backends or runnable(operator, tensors, options)
        for backend in backends:
            got = on_backend(backend, operator, tensors, options, grad)
            for name, value in got.items():
                finite = base[name].isfinite() & (truth[name].abs() < most / 8)  # parts of a sum may be larger
                assert value[finite].isfinite().all(), (backend, scale, name)
                if finite.all():
                    compared += 1
                    try:
                        assert_within_rule({name: value}, truth, base)
                    except AssertionError as error:
                        raise AssertionError(f"{backend}, values times {scale}: {error}") from None
    assert compared > len(scales)


@pytest.mark.parametrize("part", ["all", "q", "v", "a channel", "mixed", "a pixel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", ATTENTION)
def test_range(call, dtype, part):
    check(call, dtype, part)


@pytest.mark.parametrize("part", ["all", "q", "v", "depthwise_weight", "norm_weight", "x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", LAYER)
def test_range_of_layers(call, dtype, part):
    check(call, dtype, part)
