"""Locally enhanced feed-forward network (IPT-V2, section 3.5, equation 5)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision


@in_full_precision
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
    """PW(DW(GELU(PW(x)))) with the exact (erf) GELU; without biases as in the paper, or with them."""
    hidden = F.gelu(F.conv2d(x, expand_weight, expand_bias))
    padding = depthwise_weight.shape[-1] // 2
    hidden = F.conv2d(hidden, depthwise_weight, depthwise_bias, padding=padding, groups=hidden.shape[1])
    return F.conv2d(hidden, project_weight, project_bias)
