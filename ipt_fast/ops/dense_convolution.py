"""A dense 3 x 3 convolution that keeps the size of a map, and the activation behind it."""

from torch import Tensor

from .. import reference
from ..reference.dense_convolution import ACTIVATIONS
from . import _check, _cpu, _flops
from ._operator import Operator


def dense_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """A 3 x 3 convolution of all channels with stride 1 and zeros around the map, as most restoration models have them.

    On the CPU by Winograd's minimal filtering (Lavin and Gray, CVPR 2016), whose 16 products do the work of 36, in
    float32; in bfloat16, where the processor multiplies it, and backward by PyTorch. With fewer than 32 channels on
    either side PyTorch is as fast or faster. On GPUs these convolutions stay cuDNN's, and there is no kernel of this
    operator: there, "auto" takes the reference, which computes 16 bits in float32, so that F.conv2d is the function to
    call.

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        weight: (N, C, 3, 3), dtype of ``x``.
        bias: (N,), or None; dtype of ``x`` or float32.
        activation: "none" or "gelu", the exact one, of the convolution with its bias.

    Returns:
        (B, N, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "dense_convolution"
    _operator.check_tensors(x, weight, bias)
    _check.dense_weight(name, "weight", weight, x.shape[1])
    if bias is not None:
        _check.shape(name, "bias", bias, (weight.shape[0],))
    _check.one_of(name, "activation", activation, ACTIVATIONS)
    return _operator(x, weight, bias, activation)


_operator = Operator(
    dense_convolution,
    "Tensor x, Tensor weight, Tensor? bias, str activation",
    reference.dense_convolution,
    images=("x",),
    weights=("weight",),
    output_shape=lambda x, weight, *_: (x.shape[0], weight.shape[0], *x.shape[2:]),
    flops=lambda x, weight, *_: _flops.convolutions(x, weight),
)
_cpu.register(_operator)
