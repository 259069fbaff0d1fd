"""Latent IPT-V2 against its rivals: a forward of a batch, of one image, a training step.

As benchmarks/test_models.py, which has the contenders. Latents are those of 256 x 256 pixels, as in the paper.
"""

import pytest
import torch

import ipt_fast
from benchmarks import measure
from benchmarks.footprint import generator_inputs
from benchmarks.test_models import compare, inference, preset, training_step

NAME = "latent_ipt_v2_s"


def untied(model):
    """Adaptive norms that do something: as they start, gates are zero, and so is the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
@pytest.mark.parametrize("batch", [8, 1])
def test_inference(benchmark, batch, dtype_name):
    model = untied(preset(NAME, merged=True))
    compare(benchmark, inference, model, generator_inputs(batch), f"{NAME} {batch}x4x32x32", dtype_name)


@pytest.mark.parametrize("dtype_name", measure.DTYPES)
def test_training_step(benchmark, dtype_name):
    torch.manual_seed(0)
    model = untied(ipt_fast.create_model(NAME, label_dropout=0.0)).train()  # what is dropped is drawn anew in each call
    compare(benchmark, training_step, model, generator_inputs(8), f"{NAME} 8x4x32x32", dtype_name)
