"""A pointwise convolution with the norm in front of it, the GELU behind it and a residual as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from ..reference.pointwise_layer import ACTIVATIONS
from . import _check, _cpu, _flops, _norm, _triton
from ._operator import Operator, Shape


def pointwise_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """residual + PW(norm(x)), a linear layer of the channels of every pixel.

    Args:
        x: (B, C, H, W), any floating dtype and strides; on the CPU a part of the channels of a channels-last
            map is not copied.
        weight: (N, C, 1, 1), dtype of ``x``.
        bias: (N,), dtype of ``x`` or float32, or None.
        residual: (B, N, H, W), dtype of ``x``, or None. It is added last.
        norm_weight, norm_bias: (C,), or (B, C) of each image, of :func:`layer_norm_2d`; dtype of ``x`` or float32. The
            bias may be None, and both where there is no norm.
        activation: "none", or "gelu", the exact (erf) GELU of the convolution and its bias.
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, N, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "pointwise_layer"
    _operator.check_tensors(x, weight, bias, residual, norm_weight, norm_bias)
    _check.pointwise_weight(name, "weight", weight, x.shape[1])
    outputs = weight.shape[0]
    if bias is not None:
        _check.shape(name, "bias", bias, (outputs,))
    if residual is not None:
        _check.shape(name, "residual", residual, (x.shape[0], outputs, *x.shape[2:]))
    _norm.optional_norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.one_of(name, "activation", activation, ACTIVATIONS)
    return _operator(x, weight, bias, residual, norm_weight, norm_bias, activation, float(eps), centered)


def _operations(x: Shape, weight: Shape, *others: Any) -> int:
    return _flops.convolutions(x, weight)


_operator = Operator(
    pointwise_layer,
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, str activation, "
    "float eps, bool centered",
    reference.pointwise_layer,
    images=("x", "residual"),
    weights=("weight",),
    output_shape=lambda x, weight, *_: (x.shape[0], weight.shape[0], *x.shape[2:]),
    flops=_operations,
)
_cpu.register(_operator)
_triton.register(_operator)
