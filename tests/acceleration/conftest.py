"""Two models that most tests of accelerate() begin with."""

import copy

import pytest
import torch

import ipt_fast
from tests.acceleration.small import swinir, without_convolutions


@pytest.fixture
def models():
    """(plain, accelerated): the same weights in two models, and an image."""
    plain = swinir()
    accelerated = copy.deepcopy(plain)
    report = ipt_fast.accelerate(accelerated, verify=False)
    assert len(without_convolutions(report.accelerated)) == 2
    return plain, accelerated, report, torch.rand(1, 3, 8, 16)
