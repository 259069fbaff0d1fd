"""Half a layer of a Swin transformer: norm, window attention and residual."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._gate import gated_residual
from ._precision import in_full_precision
from .layer_norm_2d import layer_norm_2d
from .window_attention import window_attention

# Composed of the bare formulas, so that it, too, computes in the dtype it is given.


@in_full_precision
def window_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    project_weight: Tensor,
    bias: Tensor | None = None,
    *,
    qkv_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | None = None,
    eps: float = 1e-5,
    centered: bool = True,
    residual: bool = True,
) -> Tensor:
    """x + gate * PW(attention(PW(norm(x)))), the attention as in :func:`window_attention`; x only if residual."""
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    q, k, v = F.conv2d(y, qkv_weight, qkv_bias).chunk(3, dim=1)
    y = window_attention.formula(q, k, v, bias, num_heads=num_heads, window_size=window_size, shift=shift, scale=scale)
    y = F.conv2d(y, project_weight, project_bias)
    return gated_residual(x if residual else None, y, gate)
