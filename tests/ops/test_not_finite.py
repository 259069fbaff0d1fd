"""Infinity and NaN come out where the formula has them, and nowhere else."""

import math

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from tests.ops.cases import IMAGE_CALLS, IMAGES, build
from tests.ops.test_parity import runnable

compiled = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))

PAYLOAD = torch.tensor([0x7FFFFFFF, 0x7FC00001], dtype=torch.int32).view(torch.float32)
NEGATIVE = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)  # what x86 makes of inf - inf


def on(backend, operator, tensors, options):
    with ipt_fast.use_backend(backend), torch.no_grad():
        return getattr(ipt_fast.ops, operator)(**tensors, **options)


def check_one_pixel(backend, call, value):
    operator, tensors, options = build(call, (2, 9, 7), torch.float32)
    for name in IMAGES & tensors.keys():
        changed = tensors[name].clone()
        changed[1, -1, 4, 3] = value
        with_it = {**tensors, name: changed}
        ours, plain = on(backend, operator, with_it, options), on("reference", operator, with_it, options)
        finite = plain.isfinite()
        assert torch.equal(ours.isfinite(), finite), name
        torch.testing.assert_close(ours[finite], plain[finite], rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("level", torch.ops.ipt_fast_cpu.isa_levels() if _extension.load() else [])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, NEGATIVE[0], *PAYLOAD])
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_one_pixel_that_is_not_finite(call, value, level, monkeypatch):
    monkeypatch.setenv("IPT_FAST_CPU_ISA", level)
    check_one_pixel("cpu", call, value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_one_pixel_that_is_not_finite_on_triton(call, value):
    operator, tensors, options = build(call, (2, 9, 7), torch.float32)
    if reason := ipt_fast.explain(operator, **tensors, **options)[operator]["triton"]:
        pytest.skip(reason)
    check_one_pixel("triton", call, value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("call", ["window_attention_layer", "grid_attention_layer/modulated"])
def test_a_bias_of_q_k_or_v_that_is_not_finite(call, value):
    """That of k, the same for all keys, is of no account to a softmax only as long as it is finite."""
    operator, tensors, options = build(call, (1, 5, 6), torch.float32)
    for index in range(0, 18, 6):
        bias = tensors["qkv_bias"].clone()
        bias[index + 4] = value
        with_it = {**tensors, "qkv_bias": bias}
        plain = on("reference", operator, with_it, options)
        assert not plain.isfinite().any()
        for backend in runnable(operator, with_it, options):
            assert torch.equal(on(backend, operator, with_it, options).isnan(), plain.isnan()), (backend, index)


@compiled
@pytest.mark.parametrize("level", torch.ops.ipt_fast_cpu.isa_levels() if _extension.load() else [])
def test_a_bias_of_minus_infinity_is_a_mask(level, monkeypatch):
    monkeypatch.setenv("IPT_FAST_CPU_ISA", level)
    _, tensors, options = build("grid_attention", (1, 7, 9), torch.float32)
    tensors["bias_table"][::5] = -math.inf
    tensors["bias_table"][12] = 0.0  # a token may always look at itself
    leaves = {}
    for backend in ("cpu", "reference"):
        leaves[backend] = {name: value.clone().requires_grad_() for name, value in tensors.items()}
        with ipt_fast.use_backend(backend):
            out = ipt_fast.ops.grid_attention(**leaves[backend], **options)
            out.square().sum().backward()
        leaves[backend]["out"] = out
    for name in ("qkv", "bias_table"):
        torch.testing.assert_close(leaves["cpu"][name].grad, leaves["reference"][name].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaves["cpu"]["out"], leaves["reference"]["out"], rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", torch.ops.ipt_fast_cpu.isa_levels() if _extension.load() else [])
def test_masks_of_many_keys(level, dtype, monkeypatch):
    """The softmax is made of blocks of keys, of which any may be masked, or have far larger scores than the others."""
    monkeypatch.setenv("IPT_FAST_CPU_ISA", level)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 18, 20, generator=generator).to(dtype) for _ in range(3))
    bias = torch.zeros(2, 360, 360)
    bias[0, :90, :200] = -math.inf
    bias[0, 90:180, 150:] = -math.inf
    bias[0, 200:210] = -math.inf  # nothing to look at: NaN, as 0 / 0
    bias[1, :90] = torch.arange(360.0) * 7
    bias[1, 90:180] = torch.arange(360.0) * -7
    bias[1, 180:270, 130:140] = 1e30
    tensors = {"q": q, "k": k, "v": v, "bias": bias.to(dtype)}
    options = {"num_heads": 2, "window_size": (18, 20)}
    ours, plain = on("cpu", "window_attention", tensors, options), on("reference", "window_attention", tensors, options)
    assert plain.isnan().any() and torch.equal(ours.isnan(), plain.isnan())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance, equal_nan=True)


@compiled
def test_a_grid_finer_than_the_map_costs_nothing():
    qkv = torch.randn(1, 6, 5, 7)
    assert torch.equal(
        on("cpu", "grid_attention", {"qkv": qkv}, {"num_heads": 2, "grid_size": 2**40}),
        on("cpu", "grid_attention", {"qkv": qkv}, {"num_heads": 2, "grid_size": 7}),
    )
