"""Channel attention between two maps, accelerated: CRAFT, HVI-CIDNet and Retinexformer."""

import pytest
import torch
from torch import nn

from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


class OfTwoMaps(nn.Module):
    """A block that takes two maps, which are here the halves of one."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(*x.chunk(2, dim=1))


def craft():
    found = public_module("spandrel.architectures.CRAFT.__arch.CRAFT")
    return found.HFB(48, 6, 2.66, False, "WithBias")


def hue():
    return public_module("spandrel.architectures.HVICIDNet.__arch.LCA").HV_LCA(36, 2)


def intensity():
    return public_module("spandrel.architectures.HVICIDNet.__arch.LCA").I_LCA(36, 2)


def retinexformer():
    found = public_module("spandrel.architectures.RetinexFormer.__arch.retinexformer_arch")
    return found.IGAB(62, dim_head=31, heads=2, num_blocks=1)


BLOCKS = {
    "CRAFT fusion block": (craft, 48),
    "HVI-CIDNet block of hue": (hue, 36),
    "HVI-CIDNet block of intensity": (intensity, 36),
    "Retinexformer block": (retinexformer, 62),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(name, dtype):
    make, channels = BLOCKS[name]
    assert_same(randomised(OfTwoMaps(make())), (2, 2 * channels, 9, 7), dtype, {name})
