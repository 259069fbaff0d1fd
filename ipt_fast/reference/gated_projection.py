"""The sum of two gated maps, projected."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision


@in_full_precision
def gated_projection(
    x: Tensor,
    other: Tensor,
    channel_gate: Tensor,
    pixel_gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """PW(channel gate * x + pixel gate * other) + residual; the channel gate is (C,), or (B, C) of each image."""
    y = F.conv2d(channel_gate[..., None, None] * x + pixel_gate * other, weight, bias)
    return y if residual is None else residual + y
