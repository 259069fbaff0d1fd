"""Half a transformer layer of IPT-V2: norm, focal context self-attention and residual as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _flops, _norm, _triton
from ._operator import Operator, Shape
from .focal_channel_attention import focal_parameters, one_for_both


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
    qkv_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    window_size: int,
    eps: float = 1e-5,
    centered: bool = True,
    cyclic: bool = True,
) -> Tensor:
    """x + gate * PW(FCSA(DW3x3(PW(norm(x))))), half of a transformer layer (IPT-V2, eq. 1 to 3).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), or (B, C) of each image, the bias may be None, of :func:`layer_norm_2d`; dtype of
            ``x`` or float32. Adaptive layer norm (DiT's adaLN) is a norm with 1 + scale and shift of each image.
        qkv_weight: (3C, C, 1, 1), dtype of ``x``, as the next two.
        depthwise_weight: (3C, 1, 3, 3).
        project_weight: (C, C, 1, 1).
        temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic: of
            :func:`focal_channel_attention`.
        qkv_bias, depthwise_bias, project_bias: (3C,), (3C,) and (C,), or None.
        gate: (C,), or (B, C) of each image, what the branch is multiplied by before ``x`` is added; None for 1. dtype
            of ``x`` or float32, as the biases.
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "focal_attention_layer"
    weights = (qkv_weight, depthwise_weight, project_weight)
    biases = (qkv_bias, depthwise_bias, project_bias)
    focal = (temperature, token_weight, top_weight, bottom_weight)
    _operator.check_tensors(x, norm_weight, norm_bias, *weights, *focal, *biases, gate)
    channels = _norm.norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.heads_divide(name, channels, num_heads)
    _check.shape(name, "qkv_weight", qkv_weight, (3 * channels, channels, 1, 1))
    _check.shape(name, "depthwise_weight", depthwise_weight, (3 * channels, 1, 3, 3))
    _check.shape(name, "project_weight", project_weight, (channels, channels, 1, 1))
    focal = focal_parameters(name, *focal, num_heads, window_size, cyclic)
    _check.biases(name, qkv=(qkv_bias, 3 * channels), depthwise=(depthwise_bias, 3 * channels))
    _check.biases(name, project=(project_bias, channels))
    _norm.norm_parameters(name, x, gate=gate)
    tensors = (norm_weight, norm_bias, *weights, *focal, *biases, gate)
    return _operator(x, *tensors, num_heads, window_size, eps, centered, cyclic)


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
    attention = 2 * 4 * batch * height * width * channels * (channels // temperature[-1])
    return _flops.convolutions(x, qkv, depthwise, project) + attention


_operator = Operator(
    focal_attention_layer,
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, "
    "Tensor qkv_weight, Tensor depthwise_weight, Tensor project_weight, Tensor temperature, "
    "Tensor token_weight, Tensor top_weight, Tensor bottom_weight, "
    "Tensor? qkv_bias, Tensor? depthwise_bias, Tensor? project_bias, Tensor? gate, "
    "int num_heads, int window_size, float eps, bool centered, bool cyclic",
    reference.focal_attention_layer,
    images=("x",),
    weights=("qkv_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)
_plain = dict(qkv_bias=None, depthwise_bias=None, project_bias=None, gate=None, cyclic=True)


def _limit(norm_weight: Tensor, norm_bias: Tensor | None, temperature: Tensor, token_weight: Tensor) -> str | None:
    return _norm.one_for_all(norm_weight, norm_bias) or one_for_both(temperature, token_weight)


_cpu.register(_operator, keeps_a_map=True, packs=True)
_triton.register(_operator, lambda x, num_heads: _triton.head_limit(x.shape[1], num_heads))
_cuda.register(
    _operator,
    lambda x, norm_weight, norm_bias, temperature, token_weight, num_heads, window_size: (
        _limit(norm_weight, norm_bias, temperature, token_weight)
        or _cuda.heads_limit(x.shape[1], num_heads)
        or _cuda.window_limit(window_size)
    ),
    lacks=_plain,
)
