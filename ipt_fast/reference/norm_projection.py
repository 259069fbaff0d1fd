"""Layer normalisation of tokens and a linear projection (the pre-norm of IPT's layers, equations 1 and 2)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision_like


def token_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * w + b over the channels of every token of (B, N, D); ``x`` without a weight."""
    if weight is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


@in_full_precision_like("weight")
def norm_projection(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    offset: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """LN(x) Wᵀ of tokens (B, N, D), to whose first channels the offset of each token is added."""
    out = F.linear(token_norm(x, norm_weight, norm_bias, eps), weight)
    return out if offset is None else out + F.pad(offset, (0, len(weight) - offset.shape[1]))
