"""Half a transformer layer of IPT-V2: norm, focal context self-attention and residual (equations 1 to 3)."""

import torch.nn.functional as F
from torch import Tensor

from ._gate import gated_residual
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
    qkv_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    window_size: int,
    eps: float = 1e-5,
    centered: bool = True,
    cyclic: bool = True,
) -> Tensor:
    """x + gate * PW(FCSA(DW3x3(PW(norm(x))))), the attention as in :func:`focal_channel_attention`."""
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    qkv = F.conv2d(y, qkv_weight, qkv_bias)
    qkv = F.conv2d(qkv, depthwise_weight, depthwise_bias, padding=1, groups=len(depthwise_weight))
    focal = (temperature, token_weight, top_weight, bottom_weight)
    y = focal_channel_attention.formula(qkv, *focal, num_heads=num_heads, window_size=window_size, cyclic=cyclic)
    return gated_residual(x, F.conv2d(y, project_weight, project_bias), gate)
