"""Calls of the operators that have CUDA kernels, at widths these take."""

import torch

from tests.ops import cases

# name: (call of tests/ops/cases.py, shape (batch, height, width), fields)
SIZES = {
    "leffn 32": ("leffn", (1, 13, 9), {"channels": 32, "hidden": 64, "out": 32}),
    "leffn layer 32": ("leffn_layer", (2, 17, 10), {"channels": 32, "hidden": 128}),
    "leffn layer 48": ("leffn_layer", (1, 5, 19), {"channels": 48, "hidden": 96}),
    "leffn layer 64, one pixel": ("leffn_layer", (1, 1, 1), {"channels": 64, "hidden": 64}),
    "leffn layer 96": ("leffn_layer", (1, 16, 3), {"channels": 96, "hidden": 64}),
    "leffn layer bias-free": ("leffn_layer/bias_free", (1, 9, 18), {"channels": 48, "hidden": 64}),
    "focal layer 32": ("focal_attention_layer", (1, 19, 23), {"heads": 1, "depth": 32, "window": 16}),
    "focal layer 64": ("focal_attention_layer", (1, 9, 11), {"heads": 2, "depth": 32, "window": 8}),
    "focal layer 48, odd window": ("focal_attention_layer", (2, 11, 7), {"heads": 1, "depth": 48, "window": 5}),
    "focal layer 96, map below a window": ("focal_attention_layer", (1, 6, 5), {"heads": 2, "depth": 48, "window": 32}),
    "focal layer 32, shared blocks": ("focal_attention_layer", (1, 70, 41), {"heads": 1, "depth": 32, "window": 90}),
    "focal layer 96 in three heads": ("focal_attention_layer", (1, 10, 17), {"heads": 3, "depth": 32, "window": 6}),
    "focal layer bias-free": ("focal_attention_layer/bias_free", (1, 18, 33), {"heads": 1, "depth": 32, "window": 32}),
    "grid layer 32 g8": ("grid_attention_layer", (1, 17, 19), {"heads": 1, "depth": 32, "grid": 8}),
    "grid layer 64 g3": ("grid_attention_layer", (2, 7, 11), {"heads": 2, "depth": 32, "grid": 3}),
    "grid layer 48 g16": ("grid_attention_layer", (1, 18, 31), {"heads": 1, "depth": 48, "grid": 16}),
    "grid layer 96 in three heads g5": ("grid_attention_layer", (1, 11, 9), {"heads": 3, "depth": 32, "grid": 5}),
    "grid layer 96, map below a grid": ("grid_attention_layer", (1, 5, 6), {"heads": 2, "depth": 48, "grid": 16}),
    "grid layer 32 g8, no biases": ("grid_attention_layer/bias_free", (1, 9, 15), {"heads": 1, "depth": 32, "grid": 8}),
    "grid layer 48 g16, large biases": ("grid_attention_layer", (1, 16, 35), {"heads": 1, "depth": 48, "grid": 16}),
    "grid layer 32 g6, large biases": ("grid_attention_layer", (1, 13, 12), {"heads": 1, "depth": 32, "grid": 6}),
    "focal layer 32, large weights": ("focal_attention_layer", (1, 11, 17), {"heads": 1, "depth": 32, "window": 8}),
    "merge_pointwise": ("merge_pointwise", (), {}),
    "merge_depthwise": ("merge_depthwise", (), {}),
}


def build(name, dtype, small_dtype=torch.float32):
    """(operator, tensors, options) of a call, on the device under test."""
    call, shape, fields = SIZES[name]
    operator, builder, defaults = cases.CALLS[call]
    tensors, options = builder(*(shape or (1, 1, 1)), **{**defaults, **fields})
    if name.endswith("no biases"):
        del tensors["bias_table"]
        options["bias_table"] = None
    elif name.endswith("large biases"):  # scores grow on the way through the keys, and some keys are left out
        tensors["bias_table"] *= 10
        tensors["bias_table"][::7] = -torch.inf
    elif name.endswith("large weights"):  # times a value of q they exceed float16's range
        tensors["token_weight"] *= 300
    return operator, cases.cast(tensors, dtype, small_dtype), options
