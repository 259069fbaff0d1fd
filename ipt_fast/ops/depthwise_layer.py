"""A depthwise convolution with the norm in front of it and the GELU behind it as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from ..reference.depthwise_layer import ACTIVATIONS
from . import _check, _cpu, _flops, _norm, _triton
from ._operator import Operator, Shape


def depthwise_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """GELU(DW(norm(x))), the convolutional branch of aggregation transformers (DAT, Chen et al., ICCV 2023).

    Args:
        x: (B, C, H, W), any floating dtype and strides; on the CPU a part of the channels of a channels-last map
            is not copied.
        weight: (C, 1, K, K), K odd, dtype of ``x``.
        bias: (C,), dtype of ``x`` or float32, or None.
        norm_weight, norm_bias: (C,), or (B, C) of each image, of :func:`layer_norm_2d`; dtype of ``x`` or float32. The
            bias may be None, and both where there is no norm.
        activation: "gelu", the exact (erf) GELU, or "none".
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "depthwise_layer"
    _operator.check_tensors(x, weight, bias, norm_weight, norm_bias)
    channels = x.shape[1]
    _check.depthwise_weight(name, "weight", weight, channels)
    if bias is not None:
        _check.shape(name, "bias", bias, (channels,))
    _norm.optional_norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.one_of(name, "activation", activation, ACTIVATIONS)
    return _operator(x, weight, bias, norm_weight, norm_bias, activation, float(eps), centered)


def _operations(x: Shape, weight: Shape, *others: Any) -> int:
    return _flops.convolutions(x, weight)


_operator = Operator(
    depthwise_layer,
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, str activation, float eps, "
    "bool centered",
    reference.depthwise_layer,
    images=("x",),
    weights=("weight",),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)
_cpu.register(_operator)
_triton.register(_operator, lambda weight: _triton.depthwise_limit(weight))
