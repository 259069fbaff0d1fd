"""Random arguments that calls of several operators share."""

import torch


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def biases(outputs):
    return {f"{name}_bias": 0.5 * random(count) for name, count in outputs.items()}


def norm(channels, bias):
    weights = {"norm_weight": 1 + 0.3 * random(channels)}
    return weights | ({"norm_bias": random(channels)} if bias else {})


def norm_options(bias):
    return {"eps": 1e-5, "centered": bias, **({} if bias else {"norm_bias": None})}


def pointwise(out, channels):
    return random(out, channels, 1, 1) * channels**-0.5
