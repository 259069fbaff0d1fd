"""Restormer's blocks, and the blocks of its kin, on the operators."""

import pytest
import torch

from tests.acceleration.plain import assert_as_plain, randomise
from tests.oracles.public import public_module


def restormer_block(norm, heads=2, channels=96):
    found = public_module("spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch")
    return randomise(found.TransformerBlock(channels, heads, 2.66, norm == "bias", norm).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["BiasFree", "WithBias"])
def test_restormer(norm, dtype):
    assert_as_plain(restormer_block(norm), (2, 96, 11, 7), dtype, known=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_odd_number_of_hidden_channels(dtype):
    assert_as_plain(restormer_block("WithBias", 1, 48), (1, 48, 9, 13), dtype, known=1)


def test_kbnet():
    found = public_module("spandrel.architectures.KBNet.__arch.kbnet_l")
    block = randomise(found.KBBlock_l(48, 1, 1.5, False).double())
    assert_as_plain(block, (2, 48, 7, 9), torch.float32, known=1)
