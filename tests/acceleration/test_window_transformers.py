"""Others' window transformers, accelerated: outputs and all gradients are those of the plain models."""

import pytest
import torch

from tests.acceleration.architectures import MODELS
from tests.acceleration.comparison import assert_same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_an_architecture(name, dtype):
    make, rules = MODELS[name]
    model = make()
    channels = next(model.parameters()).shape[1]
    assert_same(model, (2, channels, 13, 18), dtype, rules)
