"""Layer normalisation of tokens and a linear projection (the pre-norm of IPT's layers, equations 1 and 2)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision_like


def token_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the channels of every token of (B, N, D); without a weight ``x`` as it is."""
    return x if weight is None else F.layer_norm(x, weight.shape, weight, bias, eps)


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
