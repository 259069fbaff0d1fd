"""The attention of Restormer, between channels instead of pixels, without norm and residual."""

from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _fusion
from ._layer import Branch, Modulation, Norm
from .attention import check_heads


@_fusion.stock
class TransposedAttention(Branch):
    """Multi-Dconv head transposed attention, MDTA (Zamir et al., Restormer, CVPR 2022, section 3.1).

    PW and DW 3x3 to q, k, v; attention between the channels of each head, whose temperature multiplies; PW. Submodules
    are named as Restormer's.

    Args:
        channels: C.
        num_heads: heads, dividing C.
        bias: of the three convolutions.
        window_size: side in pixels of the windows that attention sees in eval mode, spread evenly and averaged where
            they overlap (TLC, Chu et al., ECCV 2022); while it is trained, and where this is None, it sees the whole
            image. See ``overlapping`` of :func:`ipt_fast.ops.channel_attention`.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.
    """

    layer_operator = "channel_attention_layer"

    def __init__(self, channels: int, num_heads: int, bias: bool = False, window_size: int | None = None) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, num_heads=num_heads)
        _check.flags(bias=bias)
        check_heads(channels, num_heads)
        if window_size is not None:
            _check.positive_ints(window_size=window_size)
        self.channels = channels
        self.num_heads = num_heads
        self.window_size = window_size
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        return self.project_out(self.operators.channel_attention(q, k, v, **self._core_arguments()))

    def changed_inside(self) -> str | None:
        return _fusion.first(
            qkv=_fusion.pointwise(self.qkv),
            qkv_dwconv=_fusion.depthwise(self.qkv_dwconv, 3),
            project_out=_fusion.pointwise(self.project_out),
        )

    def branch_arguments(self) -> dict[str, Any]:
        return dict(
            qkv_weight=self.qkv.weight,
            depthwise_weight=self.qkv_dwconv.weight,
            project_weight=self.project_out.weight,
            qkv_bias=self.qkv.bias,
            depthwise_bias=self.qkv_dwconv.bias,
            project_bias=self.project_out.bias,
            **self._core_arguments(),
        )

    def _core_arguments(self) -> dict[str, Any]:
        """The arguments of :func:`ipt_fast.ops.channel_attention` but q, k and v."""
        windows = not self.training and self.window_size is not None
        return dict(
            temperature=self.temperature.flatten(),
            num_heads=self.num_heads,
            window_size=[self.window_size, self.window_size] if windows else None,
            overlapping=windows,
        )

    def layer(self, x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        return super().layer(x, norm, modulation)
