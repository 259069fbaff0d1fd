"""Channel attention of values as large and as small as their dtype holds: no worse than the reference."""

import pytest
import torch

from ipt_fast import reference
from tests.ops.cases import CALLS, assert_within_rule, baseline, build, exact, forward_and_gradients, public
from tests.ops.test_parity import on_backend, runnable

ATTENTION = [call for call in CALLS if "channel_attention" in call and "layer" not in call and "odd" not in call]
LAYER = "focal_attention_layer"
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
    elif part == "a_channel":
        q[:, 1] *= scale
        k[:, 0] *= scale
    elif part == "mixed":
        q[:, ::2] *= scale
        q[:, 1::2] /= scale
        k[:, 1::2] *= scale
    elif part == "a_row":
        q[1] *= scale
        k[2] *= scale
    elif part == "a_pixel":
        q[..., 3, 4] *= scale
        k[..., 3, 5] *= scale
    else:
        tensors[part] *= scale


def check(operator, tensors, options, dtype, backends=None):
    most = torch.finfo(dtype).max
    tensors = {name: value.clamp(-most, most).to(dtype) for name, value in tensors.items()}
    grad = torch.randn(public(operator, tensors, options).shape).to(tensors["temperature"])
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    plain = forward_and_gradients(getattr(reference, operator).formula, tensors, options, grad)
    for backend in backends or runnable(operator, tensors, options)[1:]:  # but "auto"
        for name, value in on_backend(backend, operator, tensors, options, grad).items():
            finite = plain[name].isfinite() & (truth[name].abs() < most / 8)  # parts of a sum may be larger
            assert value[finite].isfinite().all(), (backend, name)
            if finite.all():
                assert_within_rule({name: value}, truth, base)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("part", ["all", "q", "v", "a_channel", "mixed", "a_pixel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", ATTENTION)
def test_range(call, dtype, part, scale, monkeypatch):
    operator, tensors, options = build(call, (1, 7, 9))
    if dtype == torch.bfloat16 and scale == 1e-38:
        # Instructions for products of bfloat16 take subnormal numbers for zero.
        monkeypatch.setenv("IPT_FAST_CPU_ISA", "generic")
    scaled(part, tensors, scale)
    check(operator, tensors, options, dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("part", ["all", "q", "v", "depthwise_weight", "norm_weight", "x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_range_of_the_layer(dtype, part, scale):
    operator, tensors, options = build(LAYER, (1, 7, 9))
    scaled(part, tensors, scale)
    check(operator, tensors, options, dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("part", ["all", "a_pixel"])
def test_range_of_a_large_image(part, scale):
    """Sums of several programs, one of which may have values of another size."""
    operator, tensors, options = build("channel_attention", (1, 39, 53))
    scaled(part, tensors, scale)
    check(operator, tensors, options, torch.float32)
