"""Merging the depthwise branches of Rep-LeFFN, inside the training forward and once for inference."""

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _triton
from ._operator import Operator


def merge_depthwise(k5: Tensor, k3: Tensor, k1: Tensor, identity: bool = True) -> Tensor:
    """The weight of DW5x5(x) + DW3x3(x) + DW1x1(x) (+ x) as one depthwise convolution (IPT-V2, section 3.5, eq. 6).

    Differentiable. Autocast leaves it in the dtype of the weights, so that they are rounded once, after the merge.

    Args:
        k5: (C, 1, 5, 5), any floating dtype.
        k3: (C, 1, 3, 3), dtype of ``k5``.
        k1: (C, 1, 1, 1), dtype of ``k5``.
        identity: whether the sum has the term x.

    Returns:
        (C, 1, 5, 5), dtype of ``k5``, contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _operator.check_tensors(k5, k3, k1)
    _check.depthwise_weight("merge_depthwise", "k5", k5, None, 5)
    _check.depthwise_weight("merge_depthwise", "k3", k3, k5.shape[0], 3)
    _check.depthwise_weight("merge_depthwise", "k1", k1, k5.shape[0], 1)
    _check.flag("merge_depthwise", "identity", identity)
    return _operator(k5, k3, k1, identity)


_operator = Operator(
    merge_depthwise,
    "Tensor k5, Tensor k3, Tensor k1, bool identity",
    reference.merge_depthwise,
    weights=("k5", "k3", "k1"),
    output_shape=lambda k5, *_: k5.shape,
    flops=lambda *_: 0,
    autocast=False,
)
_cpu.register(_operator)
_triton.register(_operator)
_cuda.register(_operator, has_backward=True)
