"""Merging two pointwise convolutions of Rep-LeFFN, inside the training forward and once for inference."""

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
    _operator.check_tensors(first, second)
    _check.pointwise_weight("merge_pointwise", "first", first)
    _check.pointwise_weight("merge_pointwise", "second", second, first.shape[0])
    return _operator(first, second)


_operator = Operator(
    merge_pointwise,
    "Tensor first, Tensor second",
    reference.merge_pointwise,
    weights=("first", "second"),
    output_shape=lambda first, second: (second.shape[0], first.shape[1], 1, 1),
    flops=lambda first, second: 2 * math.prod(first) * second[0],
    autocast=False,
)
_cpu.register(_operator)
_triton.register(_operator)
_cuda.register(_operator, has_backward=True)
