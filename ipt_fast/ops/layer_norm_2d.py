"""Layer normalisation over the channels of a map."""

import torch

from .. import _extension, reference
from . import _check
from ._operator import Kernel, Operator


def layer_norm_2d(x, weight, bias=None, *, eps=1e-5, centered=True):
    """Layer normalisation over the channels at every pixel.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the centred, biased variance. ``centered=False`` leaves the
    mean in the numerator, which without bias is the "BiasFree" norm of Restormer (Zamir et al., CVPR 2022).

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        weight: (C,), dtype of ``x`` or float32.
        bias: (C,) or None, dtype of ``x`` or float32.
        eps: added to the variance.
        centered: subtract the mean in the numerator.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _operator.check_tensors(x, weight, bias)
    _check.shape("layer_norm_2d", "weight", weight, (x.shape[1],))
    if bias is not None:
        _check.shape("layer_norm_2d", "bias", bias, (x.shape[1],))
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


def _cpu_check(args):
    if error := _extension.error():
        return error
    if args is None:
        return None
    x = args[0]
    if x.device.type != "cpu":
        return f"the C++ kernels run on the CPU; x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the C++ kernel takes float32, bfloat16 and float16; x is {x.dtype}"
    return None


def _cpu_backward(grad, x, weight, bias, eps, centered):
    grads = torch.ops.ipt_fast_cpu.layer_norm_2d_backward(grad, x, weight, bias, eps, centered)
    return grads if bias is not None else (*grads[:2], None)


_operator.kernels["cpu"] = Kernel(
    check=_cpu_check,
    forward=lambda *args: torch.ops.ipt_fast_cpu.layer_norm_2d(*args),
    backward=_cpu_backward,
)
