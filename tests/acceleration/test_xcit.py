"""Cross-covariance attention, accelerated: timm's, of tokens, and DITN's, of windows."""

import pytest
import torch

from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_tokens(dtype):
    attention = public_module("timm.models.xcit").XCA(48, num_heads=4, qkv_bias=True)
    assert_same(randomised(attention), (2, 37, 48), dtype, {"XCiT attention"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_windows(dtype):
    attention = public_module("spandrel.architectures.DITN.__arch.DITN_Real").ISA(60, bias=True)
    assert_same(randomised(attention), (3, 60, 8, 8), dtype, {"DITN attention"})
