"""A residual connection, and the pre-norm feed-forward network after it (IPT, equations 1 and 2)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision_like
from .norm_projection import token_norm


@in_full_precision_like("x", "x", "weight1", kept=2)
def add_norm_feed_forward(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """t + W2 h + b2 of tokens with t = x + branch and h = relu(W1 LN(t) + b1); t and h are kept."""
    total = x + branch
    hidden = F.relu(F.linear(token_norm(total, norm_weight, norm_bias, eps), weight1, bias1))
    return total + F.linear(hidden, weight2, bias2), total, hidden
