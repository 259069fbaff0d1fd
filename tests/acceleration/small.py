"""A small SwinIR, and what tests ask of it."""

import torch

from ipt_fast.acceleration.accelerated import Accelerated, reason_against
from tests.acceleration.architectures import LIGHT, SPANDREL, build
from tests.modules.changed import assert_close

BLOCK = "layers.0.residual_group.blocks.1"
PARTS = ["", ".norm1", ".attn", ".attn.qkv", ".attn.proj", ".attn.softmax", ".norm2", ".mlp", ".mlp.fc1", ".mlp.act"]


def swinir(**options):
    return build(SPANDREL, "SwinIR", **(LIGHT | dict(upscale=2, upsampler="pixelshuffledirect") | options))


def blocks(model):
    return [module for module in model.modules() if type(module).__name__.endswith("SwinTransformerBlock")]


def without_convolutions(rows):
    """The rows of a report that are not of plain convolutions."""
    return [row for row in rows if row.rule != "dense convolution"]


def runs(model):
    """Whether each block runs on the operators."""
    return [isinstance(block, Accelerated) and reason_against(block) is None for block in blocks(model)]


def assert_equal_models(plain, other, x):
    with torch.no_grad():
        assert_close(other(x), plain(x))
