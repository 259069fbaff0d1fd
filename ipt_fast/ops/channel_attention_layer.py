"""Half a layer of Restormer and its kin: norm, channel attention and residual as one operator."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _flops, _norm, _triton
from ._operator import Operator, Shape
from .channel_attention import check_groups


def channel_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    depthwise_weight: Tensor | None,
    project_weight: Tensor,
    temperature: Tensor,
    *,
    qkv_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    window_size: int | Sequence[int] | None = None,
    dilation: int | None = None,
    overlapping: bool = False,
    eps: float = 1e-5,
    centered: bool = True,
    residual: bool = True,
) -> Tensor:
    """x + gate * PW(attention(DW(PW(norm(x))))), half a layer of Restormer (Zamir et al., CVPR 2022, eq. 1).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), or (B, C) of each image, the bias may be None, of :func:`layer_norm_2d`; dtype of
            ``x`` or float32.
        qkv_weight: (3C, C, 1, 1), dtype of ``x``, as the next two.
        depthwise_weight: (3C, 1, 3, 3), or None where there is no depthwise convolution.
        project_weight: (C, C, 1, 1).
        temperature, num_heads, window_size, dilation, overlapping: of :func:`channel_attention`.
        qkv_bias, depthwise_bias, project_bias: (3C,), (3C,) and (C,), or None.
        gate: (C,), or (B, C) of each image, what the branch is multiplied by before ``x`` is added; None for 1. dtype
            of ``x`` or float32, as the biases.
        eps, centered: of :func:`layer_norm_2d`.
        residual: False: ``x`` is not added.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "channel_attention_layer"
    weights, biases = (qkv_weight, depthwise_weight, project_weight), (qkv_bias, depthwise_bias, project_bias)
    _operator.check_tensors(x, norm_weight, norm_bias, *weights, temperature, *biases, gate)
    channels = _norm.norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.heads_divide(name, channels, num_heads)
    window = check_groups(name, window_size, dilation, overlapping)
    _check.shape(name, "qkv_weight", qkv_weight, (3 * channels, channels, 1, 1))
    if depthwise_weight is not None:
        _check.depthwise_weight(name, "depthwise_weight", depthwise_weight, 3 * channels, 3)
    elif depthwise_bias is not None:
        raise ValueError(f"{name}: depthwise_bias must be None where depthwise_weight is")
    _check.shape(name, "project_weight", project_weight, (channels, channels, 1, 1))
    temperature = _check.per_head(name, "temperature", temperature, num_heads)
    _check.biases(name, qkv=(qkv_bias, 3 * channels), depthwise=(depthwise_bias, 3 * channels))
    _check.biases(name, project=(project_bias, channels))
    _norm.norm_parameters(name, x, gate=gate)
    _check.flag(name, "residual", residual)
    tensors = (norm_weight, norm_bias, *weights, temperature, *biases, gate)
    return _operator(x, *tensors, num_heads, window, dilation, overlapping, eps, centered, residual)


def _operations(
    x: Shape,
    norm_weight: Shape,
    norm_bias: Shape | None,
    qkv: Shape,
    depthwise: Shape | None,
    project: Shape,
    temperature: Shape,
    qkv_bias: Shape | None,
    depthwise_bias: Shape | None,
    project_bias: Shape | None,
    gate: Shape | None,
    num_heads: int,
    *others: Any,
) -> int:
    batch, channels, height, width = x
    weights = (qkv, project) if depthwise is None else (qkv, depthwise, project)
    return _flops.convolutions(x, *weights) + 2 * 2 * batch * height * width * channels * (channels // num_heads)


_operator = Operator(
    channel_attention_layer,
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor? depthwise_weight, "
    "Tensor project_weight, Tensor temperature, Tensor? qkv_bias, Tensor? depthwise_bias, Tensor? project_bias, "
    "Tensor? gate, int num_heads, int[2]? window_size, int? dilation, bool overlapping, float eps, bool centered, "
    "bool residual",
    reference.channel_attention_layer,
    images=("x",),
    weights=("qkv_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)
_cpu.register(_operator, keeps_a_map=True, packs=True)
_triton.register(_operator, lambda x, num_heads: _triton.head_limit(x.shape[1], num_heads))
