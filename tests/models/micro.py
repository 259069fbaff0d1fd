"""A model that runs in milliseconds and has every kind of layer."""

import torch

import ipt_fast

CONFIG = {"width": 8, "depths": (2, 1, 1, 1), "window_size": 4, "grid_size": 3}


def micro_model(**config):
    """Random weights everywhere: no initial value (ones, halves, zeros) can hide a mistake."""
    model = ipt_fast.create_model("ipt_v2_tiny", **CONFIG | config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "weight" not in name.split(".")[-1] or parameter.shape[1:] == (4, 4):
                parameter.add_(0.2 * torch.rand_like(parameter))
    return model
