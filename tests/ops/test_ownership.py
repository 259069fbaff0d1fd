"""Outputs own their memory: what works in place after nn.Conv2d works in place after every operator."""

import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast.modules import LayerNorm2d
from tests.ops.cases import CALLS, build, outputs


def _set_channel(y):
    y[:, 0] = 2.0
    return y


def _scale_a_view(y):
    y[:1].mul_(3)
    return y


IN_PLACE = {
    "add_": lambda y: y.add_(1),
    "relu_": torch.relu_,
    "clamp_": lambda y: y.clamp_(-0.5, 0.5),
    "unsqueeze_": lambda y: y.unsqueeze_(0),
    "part assigned": _set_channel,
    "view scaled": _scale_a_view,
}


def runnable(operator, tensors, options):
    return [b for b, reason in ipt_fast.explain(operator, **tensors, **options)[operator].items() if reason is None]


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_outputs_are_no_views(call, dtype, mode):
    operator, tensors, options = build(call, (2, 5, 6), dtype)
    tensors = {name: value.requires_grad_(mode != "frozen") for name, value in tensors.items()}
    for backend in runnable(operator, tensors, options):
        context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
        with ipt_fast.use_backend(backend), context():
            found = outputs(operator, tensors, options)
        assert len({y.untyped_storage().data_ptr() for y in found}) == len(found)
        for y in found:
            assert not y._is_view() and y._base is None
            assert y.untyped_storage().nbytes() == y.nbytes
            with context():
                y.add_(1)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("call", CALLS)
def test_in_place_operations_with_gradients(call, name):
    """The same gradients as of the operation on a copy, of the last output: a backward needs the sums of residuals."""
    operator, tensors, options = build(call, (1, 5, 6), torch.float32)
    for backend in runnable(operator, tensors, options):
        grads = []
        for copies in (False, True):
            leaves = {key: value.detach().clone().requires_grad_() for key, value in tensors.items()}
            with ipt_fast.use_backend(backend):
                y = outputs(operator, leaves, options)[-1]
            IN_PLACE[name](y.clone() if copies else y).square().sum().backward()
            grads.append([value.grad for value in leaves.values()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_modules_before_activations_in_place():
    x = torch.rand(1, 8, 9, 9, requires_grad=True)
    for module in (LayerNorm2d(8), ipt_fast.modules.RepLeFFN(8), ipt_fast.modules.GlobalGridSelfAttention(8, 2, 3)):
        nn.Sequential(module, nn.ReLU(inplace=True))(x).sum().backward()
        assert x.grad.isfinite().all()
