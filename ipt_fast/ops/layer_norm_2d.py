"""Layer normalisation over the channels of a map."""

from torch import Tensor

from .. import reference
from . import _check, _cpu, _norm, _triton
from ._operator import Operator


def layer_norm_2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, centered: bool = True
) -> Tensor:
    """Layer normalisation over the channels at every pixel.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the centred, biased variance. ``centered=False`` leaves the
    mean in the numerator, which without bias is the "BiasFree" norm of Restormer (Zamir et al., CVPR 2022).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        weight: (C,), or (B, C) of each image; dtype of ``x`` or float32.
        bias: the same, or None.
        eps: added to the variance.
        centered: subtract the mean in the numerator.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _operator.check_tensors(x, weight, bias)
    _norm.norm_parameters("layer_norm_2d", x, weight=weight, bias=bias)
    _check.positive_number("layer_norm_2d", "eps", eps)
    _check.flag("layer_norm_2d", "centered", centered)
    return _operator(x, weight, bias, eps, centered)


_operator = Operator(
    layer_norm_2d,
    "Tensor x, Tensor weight, Tensor? bias, float eps, bool centered",
    reference.layer_norm_2d,
    images=("x",),
    output_shape=lambda x, *_: x.shape,
    flops=lambda *_: 0,
)
_cpu.register(_operator)
_triton.register(_operator)
