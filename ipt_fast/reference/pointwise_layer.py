"""A pointwise convolution, with a norm in front of it, a GELU behind it and a residual."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from .layer_norm_2d import layer_norm_2d

ACTIVATIONS = ("none", "gelu")


@in_full_precision
def pointwise_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """residual + activation(PW(norm(x))) with the exact (erf) GELU or none; each is left out where it is absent."""
    y = x if norm_weight is None else layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    y = F.conv2d(y, weight, bias)
    y = F.gelu(y) if activation == "gelu" else y
    return y if residual is None else residual + y
