"""Half a transformer layer of IPT-V2: norm, focal context self-attention and residual as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _flops, _norm, _triton
from ._operator import Operator, Shape


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
    _operator.check_tensors(x, norm_weight, norm_bias, *weights, temperature, *maps.values())
    channels = _norm.norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.heads_divide(name, channels, num_heads)
    _check.positive_int(name, "window_size", window_size)
    _check.shape(name, "qkv_weight", qkv_weight, (3 * channels, channels, 1, 1))
    _check.shape(name, "depthwise_weight", depthwise_weight, (3 * channels, 1, 3, 3))
    _check.shape(name, "project_weight", project_weight, (channels, channels, 1, 1))
    temperature = _check.per_head(name, "temperature", temperature, num_heads)
    for map_name, value in maps.items():
        _check.shape(name, map_name, value, (num_heads, window_size, window_size))
    norm = (norm_weight, norm_bias)
    return _operator(x, *norm, *weights, temperature, *maps.values(), num_heads, window_size, eps, centered)


def _operations(
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
    return _flops.convolutions(x, qkv, depthwise, project) + attention


_operator = Operator(
    focal_attention_layer,
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, "
    "Tensor qkv_weight, Tensor depthwise_weight, Tensor project_weight, Tensor temperature, "
    "Tensor token_weight, Tensor top_weight, Tensor bottom_weight, "
    "int num_heads, int window_size, float eps, bool centered",
    reference.focal_attention_layer,
    images=("x",),
    weights=("qkv_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)
_cpu.register(_operator, keeps_a_map=True, packs=True)
_triton.register(_operator, lambda x, num_heads: _triton.head_limit(x.shape[1], num_heads))
_cuda.register(
    _operator,
    lambda x, num_heads, window_size: _cuda.heads_limit(x.shape[1], num_heads) or _cuda.window_limit(window_size),
)
