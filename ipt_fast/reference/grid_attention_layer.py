"""Half a transformer layer of IPT-V2: norm, global grid self-attention and residual (equations 1 and 4)."""

import torch.nn.functional as F
from torch import Tensor

from ._gate import gated_residual
from ._precision import in_full_precision
from .grid_attention import grid_attention
from .layer_norm_2d import layer_norm_2d

# Composed of the bare formulas, so that it, too, computes in the dtype it is given.


@in_full_precision
def grid_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    project_weight: Tensor,
    bias_table: Tensor | None = None,
    *,
    qkv_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    grid_size: int,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + gate * PW(GGSA(PW(norm(x)))), the attention as in :func:`grid_attention`."""
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    qkv = F.conv2d(y, qkv_weight, qkv_bias)
    y = grid_attention.formula(qkv, bias_table, num_heads=num_heads, grid_size=grid_size)
    return gated_residual(x, F.conv2d(y, project_weight, project_bias), gate)
