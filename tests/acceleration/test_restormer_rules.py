"""Restormer's blocks, and the blocks of its kin, accelerated."""

import pytest
import torch

from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm,bias,heads,channels", [("BiasFree", False, 1, 48), ("WithBias", True, 2, 96)])
def test_restormer(norm, bias, heads, channels, dtype):
    block = public_module("spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch").TransformerBlock
    model = randomised(block(channels, heads, 2.66, bias, norm))
    assert_same(model, (2, channels, 11, 7), dtype, {"Restormer block"})


def test_kbnet():
    block = public_module("spandrel.architectures.KBNet.__arch.kbnet_l").KBBlock_l
    assert_same(randomised(block(48, 1, 1.5, False)), (2, 48, 7, 9), torch.float32, {"KBNet block"})
