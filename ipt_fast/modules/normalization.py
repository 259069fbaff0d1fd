"""Layer normalisation over channels."""

import math

import torch
from torch import Tensor, nn

from . import _check, _fusion
from ._layer import Norm


@_fusion.stock
class LayerNorm2d(Norm):
    """Layer normalisation over the channels at every pixel; see :func:`ipt_fast.ops.layer_norm_2d`.

    Args:
        channels: C.
        eps: added to the variance.
        bias: learn a bias.
        centered: subtract the mean in the numerator. ``bias=False, centered=False`` is Restormer's "BiasFree" norm.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, eps: float = 1e-5, bias: bool = True, centered: bool = True) -> None:
        super().__init__()
        _check.positive_ints(channels=channels)
        _check.flags(bias=bias, centered=centered)
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise ValueError(f"eps must be a positive number; got {eps!r}")
        self.eps = eps
        self.centered = centered
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.operators.layer_norm_2d(x, self.weight, self.bias, eps=self.eps, centered=self.centered)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, bias={self.bias is not None}, centered={self.centered}"


@_fusion.stock
class ModulatedLayerNorm2d(Norm):
    """:class:`LayerNorm2d` without parameters: each call brings the weight and the bias, (B, C) of each image.

    Args:
        eps: added to the variance.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    centered = True

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.operators.layer_norm_2d(x, weight, bias, eps=self.eps, centered=self.centered)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
