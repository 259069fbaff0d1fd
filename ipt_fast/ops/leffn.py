"""Locally enhanced feed-forward network of IPT-V2."""

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _triton
from ._operator import Operator, Shape


def leffn(
    x: Tensor,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    *,
    expand_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
) -> Tensor:
    """PW(DW(GELU(PW(x)))), exact (erf) GELU, without biases (IPT-V2, section 3.5, eq. 5) or with them.

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        expand_weight: (M, C, 1, 1), dtype of ``x``, as all weights.
        depthwise_weight: (M, 1, K, K), K odd; the map is zero-padded by K // 2.
        project_weight: (N, M, 1, 1).
        expand_bias, depthwise_bias, project_bias: (M,), (M,) and (N,), or None; dtype of ``x`` or float32.

    Returns:
        (B, N, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    weights, biases = (expand_weight, depthwise_weight, project_weight), (expand_bias, depthwise_bias, project_bias)
    _operator.check_tensors(x, *weights, *biases)
    _check.pointwise_weight("leffn", "expand_weight", expand_weight, x.shape[1])
    hidden = expand_weight.shape[0]
    _check.depthwise_weight("leffn", "depthwise_weight", depthwise_weight, hidden)
    _check.pointwise_weight("leffn", "project_weight", project_weight, hidden)
    _check.biases("leffn", expand=(expand_bias, hidden), depthwise=(depthwise_bias, hidden))
    _check.biases("leffn", project=(project_bias, project_weight.shape[0]))
    return _operator(x, *weights, *biases)


def _flops(x: Shape, expand: Shape, depthwise: Shape, project: Shape, *biases: Shape | None) -> int:
    batch, channels, height, width = x
    hidden, _, kernel, _ = depthwise
    return 2 * batch * height * width * hidden * (channels + kernel**2 + project[0])


_operator = Operator(
    leffn,
    "Tensor x, Tensor expand_weight, Tensor depthwise_weight, Tensor project_weight, "
    "Tensor? expand_bias, Tensor? depthwise_bias, Tensor? project_bias",
    reference.leffn,
    images=("x",),
    weights=("expand_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, expand, depthwise, project, *_: (x.shape[0], project.shape[0], *x.shape[2:]),
    flops=_flops,
)
_biases = dict(expand_bias=None, depthwise_bias=None, project_bias=None)
_cpu.register(_operator, packs=True)
_triton.register(_operator, _triton.depthwise_limit)
_cuda.register(_operator, _cuda.leffn_limit, lacks=_biases)
