"""OmniSR's blocks on the operators."""

import pytest
import torch

from tests.acceleration.plain import assert_as_plain, randomise
from tests.oracles.public import public_module


def model(**config):
    omnisr = public_module("spandrel.architectures.OmniSR.__arch.OmniSR")
    config = dict(num_feat=64, res_num=1, block_num=1, up_scale=2, window_size=8, pe=True, bias=True) | config
    return randomise(omnisr.OmniSR(**config).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_and_grids(dtype):
    assert_as_plain(model(), (2, 3, 17, 21), dtype, known=1)
