"""A batch of no images goes through the models as through a convolution: zero gradients for every parameter used."""

import copy

import pytest
import torch

import ipt_fast
from tests.models.micro import micro_model
from tests.modules.changed import ipt

BUILD = {
    "training": lambda: micro_model(),
    "merged": lambda: micro_model(merged=True),
    "two views": lambda: micro_model(in_channels=6),
    "gray": lambda: micro_model(in_channels=1),
    "ipt": ipt,
    "ipt sr": lambda: ipt_fast.create_model(
        "ipt_tiny", tasks=("sr_x3",), features=4, layers=1, heads=3, image_size=12, pos_every=True
    ),
}


def empty(model):
    size = getattr(model.config, "image_size", 16)
    return torch.rand(0, model.config.in_channels, size, size, requires_grad=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", BUILD)
def test_zero_gradients(form, autocast, backend):
    model = BUILD[form]().train()
    x = empty(model)
    with ipt_fast.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
        one = model(x.new_zeros(1, *x.shape[1:]))
    assert out.shape == (0, *one.shape[1:]) and out.dtype == one.dtype
    out.sum().backward()
    assert x.grad.shape == x.shape
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(not model.get_parameter(name).grad.any() for name in got)
    assert all(model.get_parameter(name).grad.shape == model.get_parameter(name).shape for name in got)
    twin = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    twin(torch.rand(1, *x.shape[1:])).sum().backward()
    assert got == {name for name, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", BUILD)
def test_frozen_and_without_gradients(form):
    model = BUILD[form]().requires_grad_(False)
    x = empty(model)
    model(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert model(x).shape[0] == 0
    part = next(iter(model.parameters())).requires_grad_()
    if not isinstance(model, ipt_fast.models.IPT):  # whose first parameter is the frozen mean
        model(x.detach()).sum().backward()
        assert not part.grad.any()


@pytest.mark.parametrize("form", ["training", "ipt"])
def test_hooks_see_the_empty_batch(form):
    model, seen = BUILD[form](), []
    model.get_submodule("latent.0.attention" if form == "training" else "body.encoder").register_forward_hook(
        lambda module, inputs, output: seen.append(len(output))
    )
    model(empty(model))
    assert seen == [0]
