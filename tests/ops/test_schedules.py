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
