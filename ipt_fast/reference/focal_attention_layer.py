"""Half a transformer layer of IPT-V2: norm, focal context self-attention and residual (equations 1 to 3)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from .focal_channel_attention import focal_channel_attention
from .layer_norm_2d import layer_norm_2d

# Composed of the bare formulas, so that it, too, computes in the dtype it is given.


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
