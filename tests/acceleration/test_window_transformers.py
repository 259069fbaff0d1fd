"""Others' window transformers, accelerated: outputs and all gradients are those of the plain models."""

import pytest
import torch

from tests.acceleration.architectures import MODELS
from tests.acceleration.comparison import assert_same

# Those whose rules other models prove in bfloat16.
LONG = {"SwinIR-L, photos", "SwinIR-M, JPEG", "SwinIR-M", "DRCT", "Uformer-T, both modulators", "RGT-S"}
CASES = [(name, torch.float32) for name in MODELS]
CASES += [pytest.param(name, torch.bfloat16, marks=[pytest.mark.slow] if name in LONG else []) for name in MODELS]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_an_architecture(name, dtype):
    make, rules, size = MODELS[name]
    model = make()
    channels = next(m.in_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert_same(model, (2, channels, *size), dtype, rules)
