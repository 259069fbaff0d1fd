"""Merging the depthwise branches of Rep-LeFFN (IPT-V2, section 3.5, equation 6)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision


@in_full_precision
def merge_depthwise(k5: Tensor, k3: Tensor, k1: Tensor, identity: bool = True) -> Tensor:
    """The weight of DW5x5(x) + DW3x3(x) + DW1x1(x) (+ x) as one 5x5 depthwise convolution."""
    centre = k1 + 1 if identity else k1
    return k5 + F.pad(k3, (1, 1, 1, 1)) + F.pad(centre, (2, 2, 2, 2))
