"""The feed-forward network of Restormer, without norm and residual."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, _fusion
from ._layer import Branch, Modulation, Norm

GATED_RATIO = 2.66  # hidden channels over C (Restormer, section 4)


@_fusion.stock
class GatedFeedForward(Branch):
    """Gated-Dconv feed-forward network, GDFN (Zamir et al., Restormer, CVPR 2022, section 3.2).

    a and b, the halves of DW3x3(PW(x)), become PW(GELU(a) * b), exact (erf) GELU. Submodules are named as Restormer's.

    Args:
        channels: C.
        ratio: a and b have int(ratio * C) channels.
        bias: of the three convolutions.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    layer_operator = "feed_forward_layer"

    def __init__(self, channels: int, ratio: float = GATED_RATIO, bias: bool = False) -> None:
        super().__init__()
        _check.positive_ints(channels=channels)
        _check.flags(bias=bias)
        check_ratio("ratio", ratio, channels)
        self.channels = channels
        hidden = int(ratio * channels)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self.channels, self.project_in)
        a, b = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(a) * b)

    def changed_inside(self) -> str | None:
        return _fusion.first(
            project_in=_fusion.pointwise(self.project_in),
            dwconv=_fusion.depthwise(self.dwconv, 3),
            project_out=_fusion.pointwise(self.project_out),
        )

    def branch_arguments(self) -> dict[str, Any]:
        return dict(
            expand_weight=self.project_in.weight,
            depthwise_weight=self.dwconv.weight,
            project_weight=self.project_out.weight,
            form="gdfn",
            expand_bias=self.project_in.bias,
            depthwise_bias=self.dwconv.bias,
            project_bias=self.project_out.bias,
        )

    def layer(self, x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
        _check.image(x, self.channels, self.project_in)
        return super().layer(x, norm, modulation)


def check_ratio(name: str, ratio: object, channels: int) -> None:
    """Check that ``ratio`` is a number that gives ``channels`` channels a hidden one."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 <= ratio * channels < math.inf:
        raise ValueError(f"{name} must be a number of at least 1 / {channels}; got {ratio!r}")
