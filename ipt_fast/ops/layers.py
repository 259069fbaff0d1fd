"""Whole halves of a transformer layer of IPT-V2: norm, attention or feed-forward, residual, each as one operator."""

import math
from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _triton
from ._operator import Operator, Shape
from .grid_attention import squared_tokens


def focal_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    temperature: Tensor,
    token_weight: Tensor,
    top_weight: Tensor,
    bottom_weight: Tensor,
    *,
    num_heads: int,
    window_size: int,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + PW(FCSA(DW3x3(PW(norm(x))))), half of a transformer layer (IPT-V2, eq. 1 to 3).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), the bias may be None, of :func:`layer_norm_2d`; dtype of ``x`` or float32.
        qkv_weight: (3C, C, 1, 1), dtype of ``x``, as the next two.
        depthwise_weight: (3C, 1, 3, 3).
        project_weight: (C, C, 1, 1).
        temperature, token_weight, top_weight, bottom_weight, num_heads, window_size: of
            :func:`focal_channel_attention`.
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "focal_attention_layer"
    weights = (qkv_weight, depthwise_weight, project_weight)
    maps = {"token_weight": token_weight, "top_weight": top_weight, "bottom_weight": bottom_weight}
    _focal.check_tensors(x, norm_weight, norm_bias, *weights, temperature, *maps.values())
    channels = _check_norm(name, x, norm_weight, norm_bias, eps, centered)
    _check.heads_divide(name, channels, num_heads)
    _check.positive_int(name, "window_size", window_size)
    _check.shape(name, "qkv_weight", qkv_weight, (3 * channels, channels, 1, 1))
    _check.shape(name, "depthwise_weight", depthwise_weight, (3 * channels, 1, 3, 3))
    _check.shape(name, "project_weight", project_weight, (channels, channels, 1, 1))
    temperature = _check.per_head(name, "temperature", temperature, num_heads)
    for map_name, value in maps.items():
        _check.shape(name, map_name, value, (num_heads, window_size, window_size))
    norm = (norm_weight, norm_bias)
    return _focal(x, *norm, *weights, temperature, *maps.values(), num_heads, window_size, eps, centered)


def grid_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    project_weight: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    grid_size: int,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + PW(GGSA(PW(norm(x)))), half of a transformer layer (IPT-V2, eq. 1 and 4).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), the bias may be None, of :func:`layer_norm_2d`; dtype of ``x`` or float32.
        qkv_weight: (3C, C, 1, 1), dtype of ``x``, as the next.
        project_weight: (C, C, 1, 1).
        bias_table, num_heads, grid_size: of :func:`grid_attention`.
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "grid_attention_layer"
    _grid.check_tensors(x, norm_weight, norm_bias, qkv_weight, project_weight, bias_table)
    channels = _check_norm(name, x, norm_weight, norm_bias, eps, centered)
    _check.heads_divide(name, channels, num_heads)
    _check.positive_int(name, "grid_size", grid_size)
    _check.shape(name, "qkv_weight", qkv_weight, (3 * channels, channels, 1, 1))
    _check.shape(name, "project_weight", project_weight, (channels, channels, 1, 1))
    if bias_table is not None:
        _check.shape(name, "bias_table", bias_table, ((2 * grid_size - 1) ** 2, num_heads))
    weights = (qkv_weight, project_weight)
    return _grid(x, norm_weight, norm_bias, *weights, bias_table, num_heads, grid_size, eps, centered)


def leffn_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    *,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + LeFFN(norm(x)), half of a transformer layer (IPT-V2, eq. 1 and 5).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), the bias may be None, of :func:`layer_norm_2d`; dtype of ``x`` or float32.
        expand_weight: (M, C, 1, 1), dtype of ``x``, as all weights of :func:`leffn`.
        depthwise_weight: (M, 1, K, K), K odd.
        project_weight: (C, M, 1, 1).
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "leffn_layer"
    weights = (expand_weight, depthwise_weight, project_weight)
    _leffn.check_tensors(x, norm_weight, norm_bias, *weights)
    channels = _check_norm(name, x, norm_weight, norm_bias, eps, centered)
    _check.pointwise_weight(name, "expand_weight", expand_weight, channels)
    hidden = expand_weight.shape[0]
    _check.depthwise_weight(name, "depthwise_weight", depthwise_weight, hidden)
    _check.shape(name, "project_weight", project_weight, (channels, hidden, 1, 1))
    return _leffn(x, norm_weight, norm_bias, *weights, eps, centered)


def _check_norm(name: str, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, centered: bool) -> int:
    """Check the arguments of the norm; returns the channels of ``x``."""
    channels = x.shape[1]
    _check.shape(name, "norm_weight", norm_weight, (channels,))
    if norm_bias is not None:
        _check.shape(name, "norm_bias", norm_bias, (channels,))
    _check.positive_number(name, "eps", eps)
    _check.flag(name, "centered", centered)
    return channels


def _convolutions(x: Shape, *weights: Shape) -> int:
    batch, _, height, width = x
    return 2 * batch * height * width * sum(map(math.prod, weights))


def _focal_flops(
    x: Shape,
    norm_weight: Shape,
    norm_bias: Shape | None,
    qkv: Shape,
    depthwise: Shape,
    project: Shape,
    temperature: Shape,
    *others: Any,
) -> int:
    batch, channels, height, width = x
    attention = 2 * 4 * batch * height * width * channels * (channels // temperature[0])
    return _convolutions(x, qkv, depthwise, project) + attention


def _grid_flops(
    x: Shape,
    norm_weight: Shape,
    norm_bias: Shape | None,
    qkv: Shape,
    project: Shape,
    bias_table: Shape | None,
    num_heads: int,
    grid_size: int,
    *others: Any,
) -> int:
    batch, channels, height, width = x
    pairs = squared_tokens(height, grid_size) * squared_tokens(width, grid_size)
    return _convolutions(x, qkv, project) + 2 * 2 * batch * channels * pairs


def _leffn_flops(
    x: Shape, norm_weight: Shape, norm_bias: Shape | None, expand: Shape, depthwise: Shape, project: Shape, *others: Any
) -> int:
    return _convolutions(x, expand, depthwise, project)


_NORM = "Tensor norm_weight, Tensor? norm_bias"

_focal = Operator(
    focal_attention_layer,
    f"Tensor x, {_NORM}, Tensor qkv_weight, Tensor depthwise_weight, Tensor project_weight, Tensor temperature, "
    "Tensor token_weight, Tensor top_weight, Tensor bottom_weight, "
    "int num_heads, int window_size, float eps, bool centered",
    reference.focal_attention_layer,
    images=("x",),
    weights=("qkv_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_focal_flops,
)
_grid = Operator(
    grid_attention_layer,
    f"Tensor x, {_NORM}, Tensor qkv_weight, Tensor project_weight, Tensor? bias_table, "
    "int num_heads, int grid_size, float eps, bool centered",
    reference.grid_attention_layer,
    images=("x",),
    weights=("qkv_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_grid_flops,
)
_leffn = Operator(
    leffn_layer,
    f"Tensor x, {_NORM}, Tensor expand_weight, Tensor depthwise_weight, Tensor project_weight, "
    "float eps, bool centered",
    reference.leffn_layer,
    images=("x",),
    weights=("expand_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_leffn_flops,
)
_cpu.register(_focal, rounds_between=True, keeps_a_map=True)
_cpu.register(_grid, rounds_between=True)
_cpu.register(_leffn, rounds_between=True)
_triton.register(_focal, lambda x, num_heads: _triton.head_limit(x.shape[1], num_heads))
_triton.register(_grid, lambda x, num_heads: _triton.head_limit(x.shape[1], num_heads))
_triton.register(_leffn, _triton.depthwise_limit)
_cuda.register(
    _focal,
    lambda x, num_heads, window_size: _cuda.heads_limit(x.shape[1], num_heads) or _cuda.window_limit(window_size),
)
_cuda.register(
    _grid,
    lambda x, num_heads, grid_size: _cuda.heads_limit(x.shape[1], num_heads) or _cuda.grid_limit(grid_size),
)
_cuda.register(_leffn, _cuda.leffn_limit)
