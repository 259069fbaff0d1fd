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


@pytest.mark.parametrize(
    ("name", "reason"),
    [("has_relu", "it has no attribute has_relu"), ("params_updated", "it is merged in its first call")],
)
def test_convolutions_of_that_name_that_are_merged_otherwise_are_left(model, name, reason):
    """As RTMoSR's and SPANPlus's, which have no activation, and TemporalSPAN's, which notes that it is merged."""
    convolution = model.block_1.c1_r
    if name == "has_relu":
        del convolution.has_relu
    else:
        convolution.params_updated = False
    (row,) = (row for row in accelerate(model, verify=False).rows if row.path == "block_1.c1_r")
    assert (row.rule, row.reason) == (None, reason)


def test_what_is_merged_in_eval_mode_stays_until_the_next(model):
    """As traiNNer-redux has it: merged by ``train(False)``, not by the forward."""
    convolution = model.block_1.c1_r
    plain = type(convolution)

    class Conv3XC(plain):
        def train(self, mode=True):
            super().train(mode)
            if not mode:
                self.update_params()
            return self

        def forward(self, x):
            return super().forward(x) if self.training else self.eval_conv(x)

    convolution.__class__ = Conv3XC
    convolution.eval()
    accelerated, image = copy.deepcopy(convolution), torch.rand(1, 48, 8, 8)
    assert accelerate(accelerated, verify=False).accelerated
    with torch.no_grad():
        for changed in (accelerated, convolution):
            for parameter in changed.conv.parameters():
                parameter.mul_(1.5)
        stale = convolution(image)
        torch.testing.assert_close(accelerated(image), stale)
        torch.testing.assert_close(accelerated.train().eval()(image), convolution.eval()(image))
    assert not torch.allclose(convolution(image), stale)
