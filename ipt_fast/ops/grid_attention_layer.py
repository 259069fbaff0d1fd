"""Half a transformer layer of IPT-V2: norm, global grid self-attention and residual as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _flops, _norm, _triton
from ._operator import Operator, Shape
from .grid_attention import squared_tokens


def grid_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    project_weight: Tensor,
    bias_table: Tensor | None = None,
    *,
    qkv_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    num_heads: int,
    grid_size: int,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + gate * PW(GGSA(PW(norm(x)))), half of a transformer layer (IPT-V2, eq. 1 and 4).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), or (B, C) of each image, the bias may be None, of :func:`layer_norm_2d`; dtype of
            ``x`` or float32. Adaptive layer norm (DiT's adaLN) is a norm with 1 + scale and shift of each image.
        qkv_weight: (3C, C, 1, 1), dtype of ``x``, as the next.
        project_weight: (C, C, 1, 1).
        qkv_bias, project_bias: (3C,) and (C,), or None.
        gate: (C,), or (B, C) of each image, what the branch is multiplied by before ``x`` is added; None for 1. dtype
            of ``x`` or float32, as the biases.
        bias_table, num_heads, grid_size: of :func:`grid_attention`.
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "grid_attention_layer"
    weights, additions = (qkv_weight, project_weight), (qkv_bias, project_bias, gate)
    _operator.check_tensors(x, norm_weight, norm_bias, *weights, bias_table, *additions)
    channels = _norm.norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.heads_divide(name, channels, num_heads)
    _check.positive_int(name, "grid_size", grid_size)
    _check.shape(name, "qkv_weight", qkv_weight, (3 * channels, channels, 1, 1))
    _check.shape(name, "project_weight", project_weight, (channels, channels, 1, 1))
    if bias_table is not None:
        _check.shape(name, "bias_table", bias_table, ((2 * grid_size - 1) ** 2, num_heads))
    _check.biases(name, qkv=(qkv_bias, 3 * channels), project=(project_bias, channels))
    _norm.norm_parameters(name, x, gate=gate)
    tensors = (norm_weight, norm_bias, *weights, bias_table, *additions)
    return _operator(x, *tensors, num_heads, grid_size, eps, centered)


def _operations(
    x: Shape,
    norm_weight: Shape,
    norm_bias: Shape | None,
    qkv: Shape,
    project: Shape,
    bias_table: Shape | None,
    qkv_bias: Shape | None,
    project_bias: Shape | None,
    gate: Shape | None,
    num_heads: int,
    grid_size: int,
    *others: Any,
) -> int:
    batch, channels, height, width = x
    pairs = squared_tokens(height, grid_size) * squared_tokens(width, grid_size)
    return _flops.convolutions(x, qkv, project) + 2 * 2 * batch * channels * pairs


_operator = Operator(
    grid_attention_layer,
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor project_weight, Tensor? bias_table, "
    "Tensor? qkv_bias, Tensor? project_bias, Tensor? gate, int num_heads, int grid_size, float eps, bool centered",
    reference.grid_attention_layer,
    images=("x",),
    weights=("qkv_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)
_plain = dict(qkv_bias=None, project_bias=None, gate=None)
_cpu.register(_operator, packs=True)
_triton.register(_operator, lambda x, num_heads: _triton.head_limit(x.shape[1], num_heads))
_cuda.register(
    _operator,
    lambda x, norm_weight, norm_bias, num_heads, grid_size: (
        _norm.one_for_all(norm_weight, norm_bias)
        or _cuda.heads_limit(x.shape[1], num_heads)
        or _cuda.grid_limit(grid_size)
    ),
    lacks=_plain,
)
