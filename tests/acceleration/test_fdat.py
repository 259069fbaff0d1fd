"""FDAT, accelerated: windows and channels; sizes of whole windows and others, where pixels of zeros take part."""

import pytest
import torch

from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 24), (9, 13)])
def test_windows_and_channels(size, dtype):
    fdat = public_module("spandrel.architectures.FDAT.__arch.fdat").FDAT
    depth = dict(num_groups=1, depth_per_group=1, drop_path_rate=0.0)
    model = randomised(fdat(scale=2, upsampler_type="pixelshuffledirect", **depth))
    assert_same(model, (2, 3, *size), dtype, {"FDAT block"})
