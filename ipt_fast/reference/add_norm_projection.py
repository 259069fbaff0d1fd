"""A residual connection, and the norm and projection after it (IPT, equation 2)."""

from torch import Tensor

from ._precision import in_full_precision_like
from .norm_projection import norm_projection


@in_full_precision_like("x", "weight")
def add_norm_projection(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    offset: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """t = x + branch, and :func:`norm_projection` of it: (t, LN(t) Wᵀ + offset)."""
    total = x + branch
    return total, norm_projection.formula(total, norm_weight, norm_bias, weight, offset, eps=eps)
