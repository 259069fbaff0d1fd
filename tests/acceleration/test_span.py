"""SPAN, accelerated: its convolutions, merged in every call."""

import copy

import pytest
import torch

from ipt_fast import accelerate
from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


@pytest.fixture
def model():
    span = public_module("spandrel.architectures.SPAN.__arch.span").SPAN
    return randomised(span(num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=2, norm=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_merged_convolutions(model, training, dtype):
    assert_same(model.block_1.c1_r, (2, 48, 7, 9), dtype, {"SPAN convolution"}, training)


def test_a_model(model):
    assert_same(model, (1, 3, 9, 8), torch.float32, {"SPAN convolution"})


def test_what_is_merged_follows_the_parameters_and_is_part_of_the_state(model):
    accelerated = copy.deepcopy(model).double()
    accelerate(accelerated, verify=False)
    plain, image = copy.deepcopy(model).double(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    for changed in (accelerated, plain):
        changed(image)
        for parameter in changed.parameters():
            parameter.data.mul_(1.5)  # no version counter tells of this
        changed(image)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(accelerated.state_dict()[name], value, msg=name)
