"""The two halves of a transformer layer of IPT-V2, each with its norm and its residual (equation 1)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from .focal_channel_attention import focal_channel_attention
from .grid_attention import grid_attention
from .layer_norm_2d import layer_norm_2d
from .leffn import leffn

# Composed of the bare formulas, so that these, too, compute in the dtype they are given.


@in_full_precision
def focal_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    temperature: Tensor,
    token_weight: Tensor,
    top_weight: Tensor,
    bottom_weight: Tensor,
    *,
    num_heads: int,
    window_size: int,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + PW(FCSA(DW3x3(PW(norm(x))))), the attention as in :func:`focal_channel_attention`."""
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    qkv = F.conv2d(F.conv2d(y, qkv_weight), depthwise_weight, padding=1, groups=len(depthwise_weight))
    maps = (token_weight, top_weight, bottom_weight)
    y = focal_channel_attention.formula(qkv, temperature, *maps, num_heads=num_heads, window_size=window_size)
    return x + F.conv2d(y, project_weight)


@in_full_precision
def grid_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    project_weight: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    grid_size: int,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + PW(GGSA(PW(norm(x)))), the attention as in :func:`grid_attention`."""
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    y = grid_attention.formula(F.conv2d(y, qkv_weight), bias_table, num_heads=num_heads, grid_size=grid_size)
    return x + F.conv2d(y, project_weight)


@in_full_precision
def leffn_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    *,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + LeFFN(norm(x)), the network as in :func:`leffn`."""
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    return x + leffn.formula(y, expand_weight, depthwise_weight, project_weight)
