"""Layer normalisation of tokens and a linear projection of them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import _aten, _check, _flops, _norm
from ._operator import Operator


def norm_projection(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    offset: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """LN(x) W^T of tokens (B, N, D), to whose first channels an offset for each token is added (IPT, eq. 1).

    A backward keeps ``x`` and normalises it again.

    Args:
        x: (B, N, D), any floating dtype. Autocast leaves it as it is.
        norm_weight, norm_bias: (D,), dtype of ``x`` or float32, of a layer norm over D. The bias may be None, and both
            where there is no norm.
        weight: (M, D), any floating dtype.
        offset: (N, K) with K of at most M, dtype of ``weight``, or None.
        eps: added to the variance.

    Returns:
        (B, N, M), dtype of ``weight`` (under autocast: the autocast dtype), contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _operator.check_tensors(x, norm_weight, norm_bias, weight, offset)
    check_projection("norm_projection", x, norm_weight, norm_bias, weight, offset, eps)
    return _operator(x, norm_weight, norm_bias, weight, offset, eps)


def check_projection(
    name: str,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    offset: Tensor | None,
    eps: float,
) -> None:
    """Check the shapes and numbers of a norm, a projection and an offset, for the operator ``name``."""
    dim = _norm.token_norm(name, x, norm_weight, norm_bias, eps)
    _check.linear_weight(name, "weight", weight, dim)
    if offset is not None and (
        offset.dim() != 2 or len(offset) != x.shape[1] or not 1 <= offset.shape[1] <= len(weight)
    ):
        raise ValueError(
            f"{name}: offset must have shape ({x.shape[1]}, at most {len(weight)}); got {tuple(offset.shape)}"
        )


def _forward(
    norm: _aten.Norm,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    offset: Tensor | None,
    eps: float,
) -> Tensor:
    return project(norm, x, None, norm_weight, norm_bias, weight, offset, eps)[1]


def project(
    norm: _aten.Norm,
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    offset: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(t = x + branch, LN(t) W^T + offset)."""
    total, y, _ = norm.forward(x, branch, norm_weight, norm_bias, eps, weight.dtype)
    out = F.linear(y, weight)
    if offset is not None:
        out[..., : offset.shape[-1]] += offset
    return total, out


def _backward(norm: _aten.Norm, grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    return project_backward(norm, None, grad, *args)


def project_backward(
    norm: _aten.Norm,
    residual: Tensor | None,
    grad: Tensor,
    total: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    offset: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of t, to which ``residual`` is added, of the norm's parameters, of the weight and of the offset."""
    _, y, statistics = norm.forward(total, None, norm_weight, norm_bias, eps, weight.dtype)
    of_weight = _aten.weight_gradient(grad, y)
    del y
    of_norm = norm.backward(grad @ weight, total, statistics, norm_weight, norm_bias, eps, residual)
    of_offset = None if offset is None else grad[..., : offset.shape[-1]].sum(0, dtype=offset.dtype)
    return *of_norm, of_weight, of_offset


_operator = Operator(
    norm_projection,
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? offset, float eps",
    reference.norm_projection,
    tokens=("x",),
    weights=("weight", "offset"),
    output_shape=lambda x, norm_weight, norm_bias, weight, *_: (*x.shape[:2], weight.shape[0]),
    outputs={"out": "weight"},
    unread=("offset",),
    flops=lambda x, norm_weight, norm_bias, weight, *_: _flops.linear(x, weight),
)
_aten.register(_operator, _forward, _backward)
