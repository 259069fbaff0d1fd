"""The two attentions of IPT-V2, without norm and residual."""

from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _fusion
from ._layer import Branch, Norm
from .convolution import Conv2d


def _check_heads(channels: int, num_heads: int) -> None:
    if channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels; got {num_heads}")


@_fusion.stock
class FocalContextSelfAttention(Branch):
    """Focal context self-attention, FCSA (IPT-V2, section 3.3): PW and DW 3x3 to q, k, v, attention, PW.

    Args:
        channels: C.
        num_heads: heads, dividing C.
        window_size: p.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.
    """

    layer_operator = "focal_attention_layer"

    def __init__(self, channels: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, num_heads=num_heads, window_size=window_size)
        _check_heads(channels, num_heads)
        self.channels = channels
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)
        self.temperature = nn.Parameter(torch.ones(num_heads))
        self.token_weight = nn.Parameter(torch.ones(num_heads, window_size, window_size))
        self.top_weight = nn.Parameter(torch.full((num_heads, window_size, window_size), 0.5))
        self.bottom_weight = nn.Parameter(torch.full((num_heads, window_size, window_size), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        attended = self.operators.focal_channel_attention(
            self.depthwise(self.qkv(x)),
            self.temperature,
            self.token_weight,
            self.top_weight,
            self.bottom_weight,
            num_heads=self.num_heads,
            window_size=self.window_size,
        )
        return self.project(attended)

    def changed_inside(self) -> str | None:
        return _fusion.first(
            qkv=_fusion.pointwise(self.qkv),
            depthwise=_fusion.depthwise(self.depthwise, 3),
            project=_fusion.pointwise(self.project),
        )

    def layer_arguments(self, norm: Norm) -> dict[str, Any]:
        return dict(
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            qkv_weight=self.qkv.weight,
            depthwise_weight=self.depthwise.weight,
            project_weight=self.project.weight,
            temperature=self.temperature,
            token_weight=self.token_weight,
            top_weight=self.top_weight,
            bottom_weight=self.bottom_weight,
            num_heads=self.num_heads,
            window_size=self.window_size,
            eps=norm.eps,
            centered=norm.centered,
        )

    def layer(self, x: Tensor, norm: Norm) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        return super().layer(x, norm)


@_fusion.stock
class GlobalGridSelfAttention(Branch):
    """Global grid self-attention, GGSA (IPT-V2, section 3.4): PW to q, k, v, attention on dilated lattices, PW.

    Args:
        channels: C.
        num_heads: heads, dividing C.
        grid_size: g.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.
    """

    layer_operator = "grid_attention_layer"

    def __init__(self, channels: int, num_heads: int, grid_size: int) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, num_heads=num_heads, grid_size=grid_size)
        _check_heads(channels, num_heads)
        self.channels = channels
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)
        self.bias_table = nn.Parameter(
            nn.init.trunc_normal_(torch.empty((2 * grid_size - 1) ** 2, num_heads), std=0.02)
        )

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        attended = self.operators.grid_attention(
            self.qkv(x), self.bias_table, num_heads=self.num_heads, grid_size=self.grid_size
        )
        return self.project(attended)

    def changed_inside(self) -> str | None:
        return _fusion.first(qkv=_fusion.pointwise(self.qkv), project=_fusion.pointwise(self.project))

    def layer_arguments(self, norm: Norm) -> dict[str, Any]:
        return dict(
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            qkv_weight=self.qkv.weight,
            project_weight=self.project.weight,
            bias_table=self.bias_table,
            num_heads=self.num_heads,
            grid_size=self.grid_size,
            eps=norm.eps,
            centered=norm.centered,
        )

    def layer(self, x: Tensor, norm: Norm) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        return super().layer(x, norm)


@_fusion.stock
class ParallelAttention(_fusion.Fusable):
    """FCSA and GGSA of one map side by side, their outputs merged by a pointwise convolution 2C -> C (figure 8, right).

    The attentions are the operators that serve each of them alone; norm and projections run module by module.

    Args:
        channels, num_heads, window_size, grid_size: of :class:`FocalContextSelfAttention` and
            :class:`GlobalGridSelfAttention`.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.
    """

    def __init__(self, channels: int, num_heads: int, window_size: int, grid_size: int) -> None:
        super().__init__()
        self.focal = FocalContextSelfAttention(channels, num_heads, window_size)
        self.grid = GlobalGridSelfAttention(channels, num_heads, grid_size)
        self.merge = Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([self.focal(x), self.grid(x)], dim=1))
