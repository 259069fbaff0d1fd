"""Restoration losses; each takes (output, target) of one shape and returns the scalar mean in fp32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def l1_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(output.float(), target.float())


def charbonnier_loss(output: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """mean sqrt((output - target)² + eps²), a smooth L1 (Charbonnier et al., ICIP 1994; eps as in MPRNet)."""
    return torch.sqrt((output.float() - target.float()).square() + eps**2).mean()


LOSSES = {"l1": l1_loss, "charbonnier": charbonnier_loss}
