"""Half a transformer layer of IPT-V2: norm, feed-forward network and residual as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _flops, _norm, _triton
from ._operator import Operator, Shape


def leffn_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    *,
    expand_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + gate * LeFFN(norm(x)), half of a transformer layer (IPT-V2, eq. 1 and 5).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), or (B, C) of each image, the bias may be None, of :func:`layer_norm_2d`; dtype of
            ``x`` or float32. Adaptive layer norm (DiT's adaLN) is a norm with 1 + scale and shift of each image.
        expand_weight: (M, C, 1, 1), dtype of ``x``, as all weights of :func:`leffn`.
        depthwise_weight: (M, 1, K, K), K odd.
        project_weight: (C, M, 1, 1).
        expand_bias, depthwise_bias, project_bias: (M,), (M,) and (C,), or None.
        gate: (C,), or (B, C) of each image, what the branch is multiplied by before ``x`` is added; None for 1. dtype
            of ``x`` or float32, as the biases.
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "leffn_layer"
    weights = (expand_weight, depthwise_weight, project_weight)
    biases = (expand_bias, depthwise_bias, project_bias)
    _operator.check_tensors(x, norm_weight, norm_bias, *weights, *biases, gate)
    channels = _norm.norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.pointwise_weight(name, "expand_weight", expand_weight, channels)
    hidden = expand_weight.shape[0]
    _check.depthwise_weight(name, "depthwise_weight", depthwise_weight, hidden)
    _check.shape(name, "project_weight", project_weight, (channels, hidden, 1, 1))
    _check.biases(name, expand=(expand_bias, hidden), depthwise=(depthwise_bias, hidden))
    _check.biases(name, project=(project_bias, channels))
    _norm.norm_parameters(name, x, gate=gate)
    return _operator(x, norm_weight, norm_bias, *weights, *biases, gate, eps, centered)


def _operations(
    x: Shape, norm_weight: Shape, norm_bias: Shape | None, expand: Shape, depthwise: Shape, project: Shape, *others: Any
) -> int:
    return _flops.convolutions(x, expand, depthwise, project)


_operator = Operator(
    leffn_layer,
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, "
    "Tensor expand_weight, Tensor depthwise_weight, Tensor project_weight, "
    "Tensor? expand_bias, Tensor? depthwise_bias, Tensor? project_bias, Tensor? gate, float eps, bool centered",
    reference.leffn_layer,
    images=("x",),
    weights=("expand_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)
_plain = dict(expand_bias=None, depthwise_bias=None, project_bias=None, gate=None)
_cpu.register(_operator, packs=True)
_triton.register(_operator, _triton.depthwise_limit)
_cuda.register(
    _operator,
    lambda norm_weight, norm_bias, expand_weight, depthwise_weight, project_weight: (
        _norm.one_for_all(norm_weight, norm_bias) or _cuda.leffn_limit(expand_weight, depthwise_weight, project_weight)
    ),
    lacks=_plain,
)
