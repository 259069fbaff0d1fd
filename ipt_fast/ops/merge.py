"""Merging the linear branches of Rep-LeFFN, inside the training forward and once for inference."""

import math

from torch import Tensor

from .. import reference
from . import _check, _cpu, _cuda, _triton
from ._operator import Operator


def merge_pointwise(first: Tensor, second: Tensor) -> Tensor:
    """The weight of PW_second(PW_first(x)) as one pointwise convolution: W2 W1 (IPT-V2, section 3.5, eq. 6).

    Differentiable. Autocast leaves it in the dtype of the weights, so that they are rounded once, after the merge.

    Args:
        first: (mid, in, 1, 1), any floating dtype.
        second: (out, mid, 1, 1), dtype of ``first``.

    Returns:
        (out, in, 1, 1), dtype of ``first``, contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _pointwise.check_tensors(first, second)
    _check.pointwise_weight("merge_pointwise", "first", first)
    _check.pointwise_weight("merge_pointwise", "second", second, first.shape[0])
    return _pointwise(first, second)


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
    _depthwise.check_tensors(k5, k3, k1)
    _check.depthwise_weight("merge_depthwise", "k5", k5, None, 5)
    _check.depthwise_weight("merge_depthwise", "k3", k3, k5.shape[0], 3)
    _check.depthwise_weight("merge_depthwise", "k1", k1, k5.shape[0], 1)
    _check.flag("merge_depthwise", "identity", identity)
    return _depthwise(k5, k3, k1, identity)


_pointwise = Operator(
    merge_pointwise,
    "Tensor first, Tensor second",
    reference.merge_pointwise,
    weights=("first", "second"),
    output_shape=lambda first, second: (second.shape[0], first.shape[1], 1, 1),
    flops=lambda first, second: 2 * math.prod(first) * second[0],
    autocast=False,
)
_depthwise = Operator(
    merge_depthwise,
    "Tensor k5, Tensor k3, Tensor k1, bool identity",
    reference.merge_depthwise,
    weights=("k5", "k3", "k1"),
    output_shape=lambda k5, *_: k5.shape,
    flops=lambda *_: 0,
    autocast=False,
)
_cpu.register(_pointwise)
_cpu.register(_depthwise)
_triton.register(_pointwise)
_triton.register(_depthwise)
_cuda.register(_pointwise, has_backward=True)
_cuda.register(_depthwise, has_backward=True)
