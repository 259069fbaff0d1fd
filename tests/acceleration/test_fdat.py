"""FDAT's blocks on the operators."""

import pytest
import torch

from tests.acceleration.plain import assert_as_plain, randomise
from tests.oracles.public import public_module


def model(**config):
    fdat = public_module("spandrel.architectures.FDAT.__arch.fdat")
    config = dict(scale=2, num_groups=1, depth_per_group=1, upsampler_type="pixelshuffledirect") | config
    return randomise(fdat.FDAT(drop_path_rate=0.0, **config).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 24), (9, 13)])
def test_windows_and_channels(size, dtype):
    assert_as_plain(model(), (2, 3, *size), dtype, known=2)
