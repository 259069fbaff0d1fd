"""Layer normalisation over the channels of a map."""

import torch
from torch import Tensor

from ._precision import in_full_precision


@in_full_precision
def layer_norm_2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, centered: bool = True
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * w + b at every pixel; ``centered=False`` leaves the mean in the numerator.

    The variance is centred and biased (1/C) in both kinds; ``centered=False`` without bias is Restormer's
    "BiasFree" norm. ``weight`` and ``bias`` are (C,), or (B, C) of each image.
    """
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    y = (x - mean if centered else x) * torch.rsqrt(var + eps) * weight[..., None, None]
    return y if bias is None else y + bias[..., None, None]
