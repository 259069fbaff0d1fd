"""Merging two pointwise convolutions of Rep-LeFFN (IPT-V2, section 3.5, equation 6)."""

from torch import Tensor

from ._precision import in_full_precision


@in_full_precision
def merge_pointwise(first: Tensor, second: Tensor) -> Tensor:
    """The weight of PW_second(PW_first(x)) as one pointwise convolution: W = W2 W1."""
    return (second.flatten(1) @ first.flatten(1))[:, :, None, None]
