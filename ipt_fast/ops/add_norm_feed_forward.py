"""A residual connection of tokens, and the pre-norm feed-forward network after it, with its own residual."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import _aten, _check, _flops, _norm
from ._operator import Operator


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
) -> Tensor:
    """t + W2 relu(W1 LN(t) + b1) + b2 of tokens (B, N, D) with t = x + branch (IPT, eq. 1 and 2).

    A backward keeps t, which it normalises again, and the hidden values after the ReLU.

    Args:
        x: (B, N, D), any floating dtype. Autocast leaves it as it is.
        branch: (B, N, D), any floating dtype. Autocast leaves it as it is.
        norm_weight, norm_bias, eps: of :func:`norm_projection`.
        weight1, bias1: (M, D) and (M,), any floating dtype, the same of these four.
        weight2, bias2: (D, M) and (D,).

    Returns:
        (B, N, D), dtype of ``x``, contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "add_norm_feed_forward"
    _operator.check_tensors(x, branch, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    _check.shape(name, "branch", branch, tuple(x.shape))
    dim = _norm.token_norm(name, x, norm_weight, norm_bias, eps)
    _check.linear_weight(name, "weight1", weight1, dim)
    hidden = len(weight1)
    _check.shape(name, "bias1", bias1, (hidden,))
    _check.shape(name, "weight2", weight2, (dim, hidden))
    _check.shape(name, "bias2", bias2, (dim,))
    out, *_ = _operator(x, branch, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps)
    return out


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(x W^T + b), on NVIDIA GPUs in the epilogue of cuBLASLt's product."""
    rows = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.T)
    return rows.view(*x.shape[:-1], len(weight))


def _forward(
    norm: _aten.Norm,
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total, y, _ = norm.forward(x, branch, norm_weight, norm_bias, eps, weight1.dtype)
    hidden = linear_relu(y, weight1, bias1)
    del y
    out = F.linear(hidden, weight2, bias2)
    out = out.add_(total) if out.dtype == total.dtype else (out + total).to(total.dtype)
    return out, total, hidden


def _backward(
    norm: _aten.Norm,
    grad: Tensor,
    total: Tensor,
    branch: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    hidden: Tensor,
) -> tuple[Tensor | None, ...]:
    of_out = grad.to(weight2.dtype)
    of_second = _aten.weight_gradient(of_out, hidden), of_out.flatten(0, -2).sum(0)
    of_hidden = of_out @ weight2
    torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
    _, y, statistics = norm.forward(total, None, norm_weight, norm_bias, eps, weight1.dtype)
    of_first = _aten.weight_gradient(of_hidden, y), of_hidden.flatten(0, -2).sum(0)
    del y
    of_y = of_hidden @ weight1
    del of_hidden
    of_norm = norm.backward(of_y, total, statistics, norm_weight, norm_bias, eps, grad)
    return *of_norm, *of_first, *of_second


def _shapes(x: Tensor, branch: Any, norm_weight: Any, norm_bias: Any, weight1: Tensor, *_: Any) -> tuple[Any, ...]:
    return x.shape, x.shape, (*x.shape[:2], weight1.shape[0])


_operator = Operator(
    add_norm_feed_forward,
    "Tensor x, Tensor branch, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, float eps",
    reference.add_norm_feed_forward,
    tokens=("x", "branch"),
    weights=("weight1", "bias1", "weight2", "bias2"),
    output_shape=_shapes,
    outputs={"out": "x"},
    kept={"total": "x", "hidden": "weight1"},
    residual=("x", "branch", "total"),
    flops=lambda x, branch, norm_weight, norm_bias, weight1, *_: 2 * _flops.linear(x, weight1),
)
_aten.register(_operator, _forward, _backward)
