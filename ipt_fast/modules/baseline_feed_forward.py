"""The feed-forward networks beside which the IPT-V2 paper puts its own (table 7c)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, _fusion
from ._layer import Branch, Modulation, Norm
from .gated_feed_forward import GATED_RATIO as GATED_RATIO
from .gated_feed_forward import GatedFeedForward as GatedFeedForward


@_fusion.stock
class FeedForward(Branch):
    """PW(GELU(PW(x))), exact (erf) GELU, no bias.

    With norm and residual it runs as a LeFFN whose depthwise convolution is 1x1 with weights of 1.

    Args:
        channels: C.
        ratio: the hidden map has ratio * C channels.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    layer_operator = "leffn_layer"

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, ratio=ratio)
        self.channels = channels
        self.expand = nn.Conv2d(channels, ratio * channels, 1, bias=False)
        self.project = nn.Conv2d(ratio * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self.channels, self.expand)
        return self.project(F.gelu(self.expand(x)))

    def changed_inside(self) -> str | None:
        return _fusion.first(expand=_fusion.pointwise(self.expand), project=_fusion.pointwise(self.project))

    def branch_arguments(self) -> dict[str, Any]:
        return dict(
            expand_weight=self.expand.weight,
            depthwise_weight=torch.ones_like(self.expand.weight[:, :1]),
            project_weight=self.project.weight,
            expand_bias=self.expand.bias,
            project_bias=self.project.bias,
        )

    def layer(self, x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
        _check.image(x, self.channels, self.expand)
        return super().layer(x, norm, modulation)
