"""A depthwise convolution, with a norm in front of it and a GELU behind it."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from .layer_norm_2d import layer_norm_2d

ACTIVATIONS = ("gelu", "none")


@in_full_precision
def depthwise_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """activation(DW(norm(x))) with the exact (erf) GELU or none; without a norm weight x is convolved as it is."""
    y = x if norm_weight is None else layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    y = F.conv2d(y, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    return F.gelu(y) if activation == "gelu" else y
