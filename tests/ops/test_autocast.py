"""Autocast casts images and weights; tokens and small parameters stay fp32, float64 and the merges as they are."""

import pytest
import torch

import ipt_fast
from tests.ops.cases import CALLS, MERGES, TOKEN_CALLS, build, cast_by_autocast, error, exact, outputs, public

HALF = [torch.bfloat16, torch.float16]
CAST = [call for call, (operator, *_) in CALLS.items() if operator not in MERGES]


def gradients(out, tensors, grad):
    return dict(zip(tensors, torch.autograd.grad(out, list(tensors.values()), grad), strict=True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("call", CAST)
def test_casts_images_and_weights_only(call, dtype, ran):
    operator, tensors, options = build(call, (2, 5, 6), torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = outputs(operator, tensors, options)
    [(_, _, _, arguments)] = ran
    received = [a.dtype for a in arguments if isinstance(a, torch.Tensor)]
    rounded = cast_by_autocast(operator, tensors, dtype)
    assert received == [value.dtype for value in rounded.values()]
    for out, expected in zip(found, outputs(operator, rounded, options), strict=True):
        assert out.dtype == expected.dtype and torch.equal(out, expected)
    if call not in TOKEN_CALLS:
        assert found[0].dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_products_of_tokens_leave_in_half_precision_and_their_sums_as_they_came(dtype):
    def dtypes(operator):
        _, tensors, options = build(operator, (2, 5, 6), torch.float32)
        tensors |= {"branch": tensors["branch"].to(dtype)} if "branch" in tensors else {}
        with torch.autocast("cpu", dtype=dtype):
            return [out.dtype for out in outputs(operator, tensors, options)]

    assert dtypes("norm_projection") == [dtype]
    assert dtypes("add_norm_projection") == [torch.float32, dtype]
    assert dtypes("add_norm_feed_forward") == [torch.float32]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("call", CAST)
def test_gradients_reach_fp32_leaves_in_fp32(call, dtype):
    operator, tensors, options = build(call, (2, 5, 6), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    with torch.autocast("cpu", dtype=dtype):
        out = public(operator, leaves, options)
    got = gradients(out, leaves, torch.ones_like(out))
    rounded = cast_by_autocast(operator, tensors, dtype)
    rounded = {name: value.clone().requires_grad_() for name, value in rounded.items()}
    expected = gradients(public(operator, rounded, options), rounded, torch.ones_like(out))
    for name, value in got.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, expected[name].float()), name


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("operator", ipt_fast.ops.__all__)
def test_backward_inside_the_autocast_block_is_as_exact_as_outside(operator, backend):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    results = []
    with ipt_fast.use_backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = public(operator, leaves, options)
            grad = torch.randn(out.shape).to(out.dtype)
            results.append(gradients(out, leaves, grad))
            out = public(operator, leaves, options)
        results.append(gradients(out, leaves, grad))
    inside, outside = results
    assert all(torch.equal(inside[name], outside[name]) for name in leaves)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("operator", ipt_fast.ops.__all__)
def test_float64_is_left_alone(operator, dtype):
    _, tensors, options = build(operator, (1, 5, 6))
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    with torch.autocast("cpu", dtype=dtype):
        out = public(operator, leaves, options)
        assert out.dtype == torch.float64
        got = gradients(out, leaves, torch.ones_like(out))
    truth = exact(operator, tensors, options, torch.ones_like(out))
    assert error(out.detach(), truth.pop("out")) < 1e-14
    assert all(error(got[name], value) < 1e-13 for name, value in truth.items())


@pytest.mark.parametrize("operator", sorted(MERGES))
def test_merges_are_not_cast(operator):
    _, tensors, options = build(operator, dtype=torch.float32)
    expected = public(operator, tensors, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = public(operator, tensors, options)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_mixed_inputs_are_accepted_under_autocast_only():
    """A half-precision map from a convolution meets fp32 weights: autocast's everyday case."""
    _, tensors, options = build("leffn", (1, 5, 6), torch.float32)
    tensors["x"] = tensors["x"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert public("leffn", tensors, options).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="expand_weight"):
        public("leffn", tensors, options)
    switched_off = torch.autocast("cpu", enabled=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), switched_off, pytest.raises(TypeError, match="expand_weight"):
        public("leffn", tensors, options)
