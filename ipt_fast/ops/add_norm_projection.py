"""A residual connection of tokens, and the norm and linear projection after it."""

from typing import Any

from torch import Tensor

from .. import reference
from . import _aten, _check, _flops
from ._operator import Operator
from .norm_projection import check_projection, project, project_backward


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
    """t = x + branch of tokens (B, N, D), and :func:`norm_projection` of t (IPT, eq. 2).

    A backward keeps t and normalises it again.

    Args:
        x: (B, N, D), any floating dtype. Autocast leaves it as it is.
        branch: (B, N, D), any floating dtype. Autocast leaves it as it is.
        norm_weight, norm_bias, weight, offset, eps: of :func:`norm_projection`.

    Returns:
        t: (B, N, D), dtype of ``x``, contiguous.
        LN(t) W^T + offset: (B, N, M), dtype of ``weight`` (under autocast: the autocast dtype), contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _operator.check_tensors(x, branch, norm_weight, norm_bias, weight, offset)
    _check.shape("add_norm_projection", "branch", branch, tuple(x.shape))
    check_projection("add_norm_projection", x, norm_weight, norm_bias, weight, offset, eps)
    return _operator(x, branch, norm_weight, norm_bias, weight, offset, eps)


def _backward(
    norm: _aten.Norm, grad_total: Tensor, grad: Tensor, total: Tensor, branch: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    return project_backward(norm, grad_total, grad, total, *args)


_operator = Operator(
    add_norm_projection,
    "Tensor x, Tensor branch, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? offset, float eps",
    reference.add_norm_projection,
    tokens=("x", "branch"),
    weights=("weight", "offset"),
    output_shape=lambda x, branch, norm_weight, norm_bias, weight, *_: (x.shape, (*x.shape[:2], weight.shape[0])),
    outputs={"total": "x", "out": "weight"},
    residual=("x", "branch", "total"),
    unread=("offset",),
    flops=lambda x, branch, norm_weight, norm_bias, weight, *_: _flops.linear(x, weight),
)
_aten.register(_operator, project, _backward)
