"""A dense 3 x 3 convolution that keeps the size of a map, and the activation behind it."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision

ACTIVATIONS = ("none", "gelu")


@in_full_precision
def dense_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """The convolution of a map with one row and column of zeros around it; GELU is the exact one."""
    y = F.conv2d(x, weight, bias, padding=1)
    return F.gelu(y) if activation == "gelu" else y
