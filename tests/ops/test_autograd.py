"""Differentiation: exact gradients, no more memory than needed, once only."""

import gc
import weakref

import pytest
import torch

import ipt_fast
from tests.ops.cases import CALLS, OPERATORS, build, public


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("call", CALLS)
def test_gradcheck(call, shape):
    operator, tensors, options = build(call, shape)
    names, values = list(tensors), [value.requires_grad_() for value in tensors.values()]

    def function(*values):
        return public(operator, dict(zip(names, values, strict=True)), options)

    with ipt_fast.use_backend("reference"):
        assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_second_differentiation_raises(operator):
    _, tensors, options = build(operator, (1, 3, 4))
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    out = public(operator, leaves, options)
    first = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator}.* twice"):
        torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))


@pytest.mark.parametrize("call", CALLS)
def test_each_gradient_alone(call):
    """Where only one argument needs a gradient, it gets the same one, and the others none."""
    operator, tensors, options = build(call, (1, 5, 4))
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    public(operator, leaves, options).square().sum().backward()
    for name in tensors:
        single = {n: value.clone().requires_grad_(n == name) for n, value in tensors.items()}
        public(operator, single, options).square().sum().backward()
        torch.testing.assert_close(single[name].grad, leaves[name].grad)
        assert all(value.grad is None for n, value in single.items() if n != name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_is_kept_without_grad(operator, mode):
    _, tensors, options = build(operator, (1, 5, 4), torch.float32)
    if mode is not None:
        tensors = {name: value.requires_grad_() for name, value in tensors.items()}
        with mode():
            out = public(operator, tensors, options)
    else:
        out = public(operator, tensors, options)
    assert out.grad_fn is None and not out.requires_grad
    alive = [weakref.ref(value) for value in tensors.values()]
    del tensors
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_frees_what_was_saved(operator):
    _, tensors, options = build(operator, (1, 5, 4), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    out = public(operator, leaves, options)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_a_changed_input_is_noticed():
    _, tensors, options = build("leffn", (1, 5, 4), torch.float32)
    tensors["expand_weight"].requires_grad_()
    out = public("leffn", tensors, options)
    tensors["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("call", CALLS)
def test_activation_checkpointing(call):
    operator, tensors, options = build(call, (1, 5, 4))
    names, leaves = list(tensors), [value.requires_grad_() for value in tensors.values()]

    def function(*values):
        return public(operator, dict(zip(names, values, strict=True)), options)

    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("nested", [False, True])
def test_forward_mode_raises_instead_of_dropping_the_tangent(nested):
    x, weight = torch.randn(1, 4, 3, 3), torch.ones(4)
    with pytest.raises(RuntimeError, match="layer_norm_2d has no forward-mode derivative"):
        if nested:
            torch.func.jvp(lambda a: ipt_fast.ops.layer_norm_2d(a, weight), (x,), (x,))
        else:
            with torch.autograd.forward_ad.dual_level():
                ipt_fast.ops.layer_norm_2d(torch.autograd.forward_ad.make_dual(x, x), weight)
