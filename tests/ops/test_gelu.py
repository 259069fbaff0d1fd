"""GELU and its slope in the Triton kernels of 16 bits, over every number that the format has."""

import pytest
import torch

import ipt_fast
from tests.ops.cases import DEVICE


def every_number(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()].view(1, 1, -1, 256)


def units_off(found, exact, dtype, least):
    """The largest error in units of the last place; below ``least`` that place no longer moves."""
    digits = 11 if dtype == torch.float16 else 8
    exponent = torch.frexp(exact.abs().clamp_min(least)).exponent
    return ((found.double().cpu() - exact).abs() * 2.0 ** (digits - exponent)).max()


def usable(x):
    one = x.new_ones(1, 1, 1, 1)
    if reason := ipt_fast.explain("leffn", x, one, one, one)["leffn"]["triton"]:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_finite(dtype):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.0], dtype=dtype).view(1, 1, 2, 2).to(DEVICE)
    usable(x)
    from ipt_fast.kernels.pointwise import pointwise

    found = pointwise(x, x.new_ones(1, 1, 1, 1), gelu=True).cpu().flatten()[:3].float()
    exact = torch.nn.functional.gelu(x.cpu().double()).flatten()[:3].float()
    assert torch.equal(found.isnan(), exact.isnan()) and torch.equal(found.isinf(), exact.isinf())


@pytest.mark.parametrize(
    ("dtype", "most", "most_of_slope"), [(torch.float16, 0.18, 0.11), (torch.bfloat16, 0.03, 0.03)]
)
def test_every_number_of_16_bits(dtype, most, most_of_slope):
    x = every_number(dtype).to(DEVICE)
    usable(x)
    from ipt_fast.kernels.leffn import _hidden_backward
    from ipt_fast.kernels.pointwise import pointwise

    one = x.new_ones(1, 1, 1, 1)
    exact = x.double().cpu().requires_grad_()
    gelu = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(gelu.sum(), exact)
    rounding = 1.0 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5  # the interpreter cuts bf16 off
    found = pointwise(x, one, gelu=True), _hidden_backward(torch.ones_like(x), one, x, one)
    assert units_off(found[0], gelu.detach(), dtype, 2.0**-14) < rounding + most
    assert units_off(found[1], slope, dtype, 2.0**-6) < rounding + most_of_slope
