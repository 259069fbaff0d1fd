"""Calls of the operators at the models' widths, larger than those of tests/ops."""

import torch

from tests.ops import cases

# Of the models of latents.
MODULATED_FOCAL = "focal_attention_layer/modulated"
RELEASED = {**cases.RELEASED, "window": 8}

# name: (call of tests/ops/cases.py, shape (batch, height, width), fields)
SIZES = {
    "layer_norm_2d 96": ("layer_norm_2d", (2, 61, 83), {"channels": 96}),
    "channel_attention 48": ("channel_attention", (1, 131, 97), {"heads": 2, "depth": 48}),
    "focal 32 p32": ("focal_channel_attention", (1, 70, 101), {"heads": 2, "depth": 32, "window": 32}),
    "focal 48 p32": ("focal_channel_attention", (2, 64, 64), {"heads": 1, "depth": 48, "window": 32}),
    "grid 32 g8": ("grid_attention", (1, 61, 72), {"heads": 2, "depth": 32, "grid": 8}),
    "grid 48 g16": ("grid_attention", (1, 70, 64), {"heads": 2, "depth": 48, "grid": 16}),
    "leffn 48": ("leffn", (1, 45, 83), {"channels": 48, "hidden": 192, "out": 48}),
    "focal layer 32": ("focal_attention_layer", (1, 70, 64), {"heads": 2, "depth": 32, "window": 32}),
    "focal layer 48": ("focal_attention_layer", (1, 64, 70), {"heads": 2, "depth": 48, "window": 32}),
    "grid layer 32": ("grid_attention_layer", (1, 61, 72), {"heads": 2, "depth": 32, "grid": 8}),
    "grid layer 48": ("grid_attention_layer", (1, 64, 70), {"heads": 1, "depth": 48, "grid": 16}),
    "leffn layer 64": ("leffn_layer", (1, 45, 83), {"channels": 64, "hidden": 256}),
    "leffn layer 96": ("leffn_layer", (1, 45, 40), {"channels": 96, "hidden": 384}),
    "layer_norm_2d 84, each image": ("layer_norm_2d/each_image", (3, 16, 17), {"channels": 84, "each_image": True}),
    "focal 42 p8, released": ("focal_channel_attention", (2, 32, 29), {**RELEASED, "heads": 2, "depth": 42}),
    "focal layer 84, modulated": (MODULATED_FOCAL, (2, 32, 32), {**RELEASED, "heads": 2, "depth": 42}),
    "focal layer 168, modulated": (MODULATED_FOCAL, (3, 16, 15), {**RELEASED, "heads": 4, "depth": 42}),
    "grid layer 84, modulated": ("grid_attention_layer/modulated", (2, 32, 30), {"heads": 2, "depth": 42, "grid": 8}),
    "grid layer 336, modulated": ("grid_attention_layer/modulated", (3, 8, 9), {"heads": 8, "depth": 42, "grid": 8}),
    "leffn layer 84, modulated": ("leffn_layer/modulated", (2, 32, 29), {"channels": 84, "hidden": 336}),
    "leffn layer 168, modulated": ("leffn_layer/modulated", (3, 16, 16), {"channels": 168, "hidden": 672}),
    "depthwise layer 180": ("depthwise_layer/no_norm", (2, 33, 45), {"channels": 180, "bias": True}),
    "depthwise layer 120, norm": ("depthwise_layer", (1, 31, 40), {"channels": 120, "kernel": 5}),
    "gated projection 60": ("gated_projection", (2, 33, 29), {"channels": 60, "outputs": 60}),
    "gated projection 180": ("gated_projection/each_image", (3, 24, 32), {"channels": 180, "outputs": 180}),
    "pointwise layer 60": ("pointwise_layer", (2, 33, 29), {"channels": 60, "outputs": 180, "activation": "none"}),
    "pointwise layer 180": ("pointwise_layer", (1, 31, 40), {"channels": 180, "outputs": 360}),
    "pointwise layer 96, each image": (
        "pointwise_layer/bias_free",
        (3, 24, 32),
        {"channels": 96, "outputs": 96, "each_image": True},
    ),
    "pointwise layer 180, residual": (
        "pointwise_layer",
        (2, 16, 17),
        {"channels": 180, "outputs": 180, "normed": False, "activation": "none"},
    ),
}


def build(name, dtype):
    """(operator, tensors, options) of a call at a model's size, on the device under test."""
    call, shape, fields = SIZES[name]
    operator, builder, _ = cases.CALLS[call]
    tensors, options = builder(*shape, **fields)
    return operator, cases.cast(tensors, dtype, torch.float32), options
