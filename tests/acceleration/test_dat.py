"""DAT, accelerated: windows, shifted windows and channels; odd sizes, where pixels of zeros are attended to."""

import pytest
import torch

from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module

LIGHT = dict(embed_dim=60, num_heads=[6], split_size=[8, 32], expansion_factor=2.0, resi_connection="3conv")
SMALL = dict(embed_dim=180, num_heads=[6], split_size=[8, 16], expansion_factor=2.0, resi_connection="1conv")


def model(**config):
    dat = public_module("spandrel.architectures.DAT.__arch.DAT").DAT
    return randomised(dat(upscale=2, upsampler="pixelshuffledirect", drop_path_rate=0.0, **config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_windows_channels_and_shifted_windows(dtype):
    assert_same(model(depth=[3], **LIGHT), (2, 3, 11, 27), dtype, {"DAT block"})


def test_the_blocks_of_larger_models():
    assert_same(model(depth=[2], **SMALL), (1, 3, 17, 13), torch.float32, {"DAT block"})


def test_batch_norms_in_training_and_their_statistics():
    assert_same(model(depth=[2], **LIGHT), (3, 3, 32, 16), torch.float32, {"DAT block"}, training=True)
