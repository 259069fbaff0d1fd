"""OmniSR, accelerated: attention in windows and grids, of pixels and of channels."""

import pytest
import torch

from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [True, False])
def test_windows_and_grids(positions, dtype):
    omnisr = public_module("spandrel.architectures.OmniSR.__arch.OmniSR").OmniSR
    model = randomised(omnisr(num_feat=64, res_num=1, block_num=1, up_scale=2, window_size=8, pe=positions, bias=True))
    assert_same(model, (2, 3, 17, 21), dtype, {"OmniSR block"})
