"""Every schedule a Triton kernel may be given computes the same."""

import importlib

import pytest
import torch

import ipt_fast
from tests.ops.cases import DEVICE


def usable(operator, *arguments):
    if reason := ipt_fast.explain(operator, *arguments)[operator]["triton"]:
        pytest.skip(reason)


@pytest.mark.parametrize("outputs", [7, 130])
def test_schedules_of_the_projection_of_leffn(outputs, monkeypatch):
    hidden, residual = torch.randn(2, 20, 5, 7), torch.randn(2, outputs, 5, 7)
    depthwise, weight = torch.randn(20, 1, 5, 5), torch.randn(outputs, 20, 1, 1)
    plain = residual + torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(hidden, depthwise, padding=2, groups=20), weight
    )
    hidden, residual = (x.to(DEVICE, memory_format=torch.channels_last) for x in (hidden, residual))
    depthwise, weight = depthwise.to(DEVICE), weight.to(DEVICE)
    usable("leffn", residual, weight, weight.new_ones(outputs, 1, 5, 5), weight.new_ones(20, outputs, 1, 1))
    leffn = importlib.import_module("ipt_fast.kernels.leffn")
    schedules = leffn._project_tiles(4, outputs)
    assert leffn.APART in schedules and len(schedules) >= 4
    for chosen in schedules:
        monkeypatch.setattr(leffn, "config", lambda name, key, candidates, device, chosen=chosen: chosen)
        found = leffn._project(hidden, depthwise, weight, residual)
        torch.testing.assert_close(found.cpu(), plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("channels", [20, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("centered", [False, True])
def test_schedules_of_pointwise(channels, dtype, centered, monkeypatch):
    x, residual = torch.randn(2, channels, 5, 7) + 1, torch.randn(2, 40, 5, 7)
    weight, norm_weight, norm_bias = torch.randn(40, channels, 1, 1) / 8, torch.rand(channels), torch.randn(channels)
    x, residual, weight = x.to(dtype), residual.to(dtype), weight.to(dtype)
    usable("layer_norm_2d", x.to(DEVICE), norm_weight.to(DEVICE))
    norm = norm_weight.double(), norm_bias.double()
    normal = ipt_fast.reference.layer_norm_2d(x.double(), *norm, eps=1e-5, centered=centered)
    plain = torch.nn.functional.gelu(torch.nn.functional.conv2d(normal, weight.double())) + residual.double()
    x, residual = (each.to(DEVICE, memory_format=torch.channels_last) for each in (x, residual))
    weight, norm_weight, norm_bias = (each.to(DEVICE) for each in (weight, norm_weight, norm_bias))
    pointwise = importlib.import_module("ipt_fast.kernels.pointwise")
    schedules = pointwise._tiles(x.element_size(), channels, 40, True)
    assert (pointwise.APART in schedules) == (dtype == torch.float32 or channels > 128)
    for chosen in schedules:
        monkeypatch.setattr(
            pointwise,
            "config",
            lambda name, key, candidates, device, chosen=chosen: chosen if chosen in candidates else candidates[0],
        )
        found = pointwise.pointwise(x, weight, norm_weight, norm_bias, 1e-5, centered, True, residual)
        allowed = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.double().cpu(), plain, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("channels", [20, 130])
def test_schedules_of_the_gradient_through_norm_and_pointwise(channels, monkeypatch):
    x, grad, residual = torch.randn(2, channels, 5, 7), torch.randn(2, 40, 5, 7), torch.randn(2, channels, 5, 7)
    weight, norm_weight = torch.randn(40, channels, 1, 1) / 8, torch.rand(channels)
    x, grad, residual, weight = (each.half() for each in (x, grad, residual, weight))
    usable("layer_norm_2d", x.to(DEVICE), norm_weight.to(DEVICE))
    exact = [each.double().requires_grad_() for each in (x, norm_weight)]
    normal = ipt_fast.reference.layer_norm_2d(*exact, None, eps=1e-5, centered=False)
    torch.nn.functional.conv2d(normal, weight.double()).backward(grad.double())
    exact = exact[0].grad + residual.double(), exact[1].grad
    x, grad, residual = (each.to(DEVICE, memory_format=torch.channels_last) for each in (x, grad, residual))
    weight, norm_weight = weight.to(DEVICE), norm_weight.to(DEVICE)
    backward = importlib.import_module("ipt_fast.kernels.pointwise_backward")
    schedules = backward._tiles(channels)
    assert (backward.APART in schedules) == (channels > 128)
    for chosen in schedules:
        monkeypatch.setattr(backward, "config", lambda name, key, candidates, device, chosen=chosen: chosen)
        found = backward.pointwise_norm_backward(grad, weight, x, norm_weight, None, 1e-5, False, residual)
        for ours, plain in zip(found, exact, strict=False):
            error = (ours.double().cpu() - plain).abs().max() / plain.abs().max()
            assert error < 2e-3
