"""Half a layer of Restormer and its kin: norm, channel attention and residual (Zamir et al., CVPR 2022, eq. 1)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._gate import gated_residual
from ._precision import in_full_precision
from .channel_attention import channel_attention
from .layer_norm_2d import layer_norm_2d

# Composed of the bare formulas, so that it, too, computes in the dtype it is given.


@in_full_precision
def channel_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    depthwise_weight: Tensor | None,
    project_weight: Tensor,
    temperature: Tensor,
    *,
    qkv_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    window_size: int | Sequence[int] | None = None,
    dilation: int | None = None,
    overlapping: bool = False,
    eps: float = 1e-5,
    centered: bool = True,
    residual: bool = True,
) -> Tensor:
    """x + gate * PW(attention(DW(PW(norm(x))))), the attention as in :func:`channel_attention`.

    Without x if not residual, and without DW where it has no weight.
    """
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    y = F.conv2d(y, qkv_weight, qkv_bias)
    if depthwise_weight is not None:
        y = F.conv2d(y, depthwise_weight, depthwise_bias, padding=1, groups=y.shape[1])
    q, k, v = y.chunk(3, dim=1)
    y = channel_attention.formula(
        q,
        k,
        v,
        temperature,
        num_heads=num_heads,
        window_size=window_size,
        dilation=dilation,
        overlapping=overlapping,
    )
    y = F.conv2d(y, project_weight, project_bias)
    return gated_residual(x if residual else None, y, gate)
