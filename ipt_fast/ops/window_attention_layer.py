"""Half a layer of a Swin transformer: norm, window attention and residual as one operator."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _flops, _norm, _triton
from ._operator import Operator, Shape
from .window_attention import check_bias, check_shift, default_scale, squared_tokens


def window_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    project_weight: Tensor,
    bias: Tensor | None = None,
    *,
    qkv_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | None = None,
    eps: float = 1e-5,
    centered: bool = True,
    residual: bool = True,
) -> Tensor:
    """x + gate * PW(attention(PW(norm(x)))), half a layer of a Swin transformer (SwinIR, Liang et al., 2021, eq. 8).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), or (B, C) of each image, the bias may be None, of :func:`layer_norm_2d`; dtype of
            ``x`` or float32.
        qkv_weight: (3C, C, 1, 1), dtype of ``x``, as the next.
        project_weight: (C, C, 1, 1).
        bias, num_heads, window_size, shift, scale: of :func:`window_attention`.
        qkv_bias, project_bias: (3C,) and (C,), or None.
        gate: (C,), or (B, C) of each image, what the branch is multiplied by before ``x`` is added; None for 1. dtype
            of ``x`` or float32, as the biases.
        eps, centered: of :func:`layer_norm_2d`.
        residual: False: ``x`` is not added.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "window_attention_layer"
    weights, additions = (qkv_weight, project_weight), (qkv_bias, project_bias, gate)
    _operator.check_tensors(x, norm_weight, norm_bias, *weights, bias, *additions)
    channels = _norm.norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.heads_divide(name, channels, num_heads)
    window, start = _check.pair(name, "window_size", window_size), _check.pair(name, "shift", shift, 0)
    check_shift(name, window, start)
    _check.shape(name, "qkv_weight", qkv_weight, (3 * channels, channels, 1, 1))
    _check.shape(name, "project_weight", project_weight, (channels, channels, 1, 1))
    check_bias(name, bias, num_heads, window, window)
    _check.biases(name, qkv=(qkv_bias, 3 * channels), project=(project_bias, channels))
    _norm.norm_parameters(name, x, gate=gate)
    _check.flag(name, "residual", residual)
    scale = default_scale(name, scale, channels // num_heads)
    tensors = (norm_weight, norm_bias, *weights, bias, *additions)
    return _operator(x, *tensors, num_heads, window, start, scale, eps, centered, residual)


def _operations(
    x: Shape,
    norm_weight: Shape,
    norm_bias: Shape | None,
    qkv: Shape,
    project: Shape,
    bias: Shape | None,
    qkv_bias: Shape | None,
    project_bias: Shape | None,
    gate: Shape | None,
    num_heads: int,
    window_size: Sequence[int],
    shift: Sequence[int],
    *others: Any,
) -> int:
    batch, channels, *sizes = x
    rows, columns = (squared_tokens(*axis) for axis in zip(sizes, window_size, shift, strict=True))
    return _flops.convolutions(x, qkv, project) + 2 * 2 * batch * channels * rows * columns


_operator = Operator(
    window_attention_layer,
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor project_weight, Tensor? bias, "
    "Tensor? qkv_bias, Tensor? project_bias, Tensor? gate, int num_heads, int[2] window_size, int[2] shift, "
    "float? scale, float eps, bool centered, bool residual",
    reference.window_attention_layer,
    images=("x",),
    weights=("qkv_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)
_cpu.register(_operator, packs=True)
_triton.register(_operator, lambda x, num_heads: _triton.head_limit(x.shape[1], num_heads))
