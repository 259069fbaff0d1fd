"""Two maps, one gated by channels and one by pixels, their projection and residual as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _flops, _norm, _triton
from ._operator import Operator, Shape


def gated_projection(
    x: Tensor,
    other: Tensor,
    channel_gate: Tensor,
    pixel_gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + PW(channel_gate * x + pixel_gate * other), the adaptive interaction of DAT (Chen et al., ICCV 2023).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        other: as ``x``. On the CPU parts of the channels of channels-last maps are not copied.
        channel_gate: (C,), or (B, C) of each image; dtype of ``x`` or float32.
        pixel_gate: (B, 1, H, W), dtype of ``x``.
        weight: (N, C, 1, 1), dtype of ``x``.
        bias: (N,), dtype of ``x`` or float32, or None.
        residual: (B, N, H, W), dtype of ``x``, or None.

    Returns:
        (B, N, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "gated_projection"
    _operator.check_tensors(x, other, channel_gate, pixel_gate, weight, bias, residual)
    batch, channels, height, width = x.shape
    _check.shape(name, "other", other, tuple(x.shape))
    _norm.norm_parameters(name, x, channel_gate=channel_gate)
    _check.shape(name, "pixel_gate", pixel_gate, (batch, 1, height, width))
    _check.pointwise_weight(name, "weight", weight, channels)
    outputs = weight.shape[0]
    if bias is not None:
        _check.shape(name, "bias", bias, (outputs,))
    if residual is not None:
        _check.shape(name, "residual", residual, (batch, outputs, height, width))
    return _operator(x, other, channel_gate, pixel_gate, weight, bias, residual)


def _operations(x: Shape, other: Shape, channel_gate: Shape, pixel_gate: Shape, weight: Shape, *others: Any) -> int:
    return _flops.convolutions(x, weight)


_operator = Operator(
    gated_projection,
    "Tensor x, Tensor other, Tensor channel_gate, Tensor pixel_gate, Tensor weight, Tensor? bias, Tensor? residual",
    reference.gated_projection,
    images=("x", "other", "pixel_gate", "residual"),
    weights=("weight",),
    output_shape=lambda x, other, channel_gate, pixel_gate, weight, *_: (x.shape[0], weight.shape[0], *x.shape[2:]),
    flops=_operations,
)
_cpu.register(_operator)
_triton.register(_operator)
