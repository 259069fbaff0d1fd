"""Operations of what several operators have in them, from shapes: two for each multiply-accumulate."""

import math

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from ._operator import Shape


def convolutions(x: Shape, *weights: Shape) -> int:
    """Convolutions of a map (B, C, H, W) that keep its size, from the shapes of their weights."""
    batch, _, height, width = x
    return 2 * batch * height * width * sum(map(math.prod, weights))


def linear(x: Shape, weight: Shape) -> int:
    """x W^T."""
    return 2 * math.prod(x) * weight[0]


def _count_attention_on_cpu() -> None:
    """PyTorch has no formula for its own attention on the CPU, so its counter would leave that out."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    forward, backward = getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_backward")
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v))
    if backward not in flop_registry:
        register_flop_formula(backward)(
            lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)
        )


_count_attention_on_cpu()
