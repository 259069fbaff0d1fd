"""The flags of a descriptor: raised where every risky module is replaced and 16 bit is verified, and only there."""

import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast.acceleration.half import reason_against_half
from tests.oracles.foreign import load_foreign

IMAGE = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def blocks(descriptor):
    return descriptor.model.layers[0].residual_group.blocks


@pytest.mark.parametrize("name", ["SwinIR", "DAT"])
def test_flags_are_raised_and_taken_back(name):
    descriptor = load_foreign(name)
    assert (descriptor.supports_half, descriptor.supports_bfloat16) == (False, True)
    report = ipt_fast.accelerate(descriptor, example=IMAGE)
    assert (descriptor.supports_half, descriptor.supports_bfloat16) == (True, True)
    expected = descriptor(IMAGE)
    assert (descriptor.half()(IMAGE.half()).float() - expected).abs().max() <= 16 * torch.finfo(torch.float16).eps
    report.undo()
    assert (descriptor.supports_half, descriptor.supports_bfloat16) == (False, True)


def test_a_module_that_is_left_speaks_against_it():
    descriptor = load_foreign("SwinIR")
    blocks(descriptor)[1].mlp.act = nn.ReLU()  # no rule for it
    report = ipt_fast.accelerate(descriptor, example=IMAGE)
    assert len(report.accelerated) == 1 and not descriptor.supports_half
    assert "blocks.1 is left as it is: its act is a ReLU" in reason_against_half(descriptor.model, IMAGE, report.rows)


def test_what_runs_beside_speaks_against_it():
    """Self-attention in plain PyTorch at the end of a model all of whose known modules are replaced."""

    class Attention(nn.Conv2d):
        def forward(self, x):
            x = super().forward(x)
            tokens = x.flatten(2)
            return (tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)).view_as(x)

    descriptor = load_foreign("SwinIR")
    descriptor.model.conv_after_body = Attention(12, 12, 3, padding=1)
    report = ipt_fast.accelerate(descriptor, example=IMAGE)
    assert len(report.accelerated) == len(report.rows) == 2 and not descriptor.supports_half
    assert "it calls _softmax, bmm" in reason_against_half(descriptor.model.eval(), IMAGE, report.rows)


@pytest.mark.parametrize(("factor", "raised"), [(1, True), (1e7, False)])
def test_what_overflows_is_found_by_running_it(factor, raised):
    """The same network with a stronger first and a weaker last convolution: float16 has no such numbers between."""
    descriptor = load_foreign("SwinIR")
    with torch.no_grad():
        for parameter in descriptor.model.conv_first.parameters():
            parameter.mul_(factor)
    ipt_fast.accelerate(descriptor, example=IMAGE)
    assert descriptor.supports_half == raised


def test_models_without_rules_keep_their_flags():
    descriptor = load_foreign("Compact")
    descriptor.supports_half = False
    assert ipt_fast.accelerate(descriptor).rows == [] and not descriptor.supports_half
    assert reason_against_half(descriptor.model, IMAGE, []) == "no module runs on the operators"


def test_without_verification_no_flag_is_raised():
    descriptor = load_foreign("SwinIR")
    assert ipt_fast.accelerate(descriptor, verify=False).accelerated and not descriptor.supports_half
