"""The two attentions of IPT-V2, without norm and residual."""

from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _fusion
from ._layer import Branch, Modulation, Norm
from .convolution import Conv2d

READINGS = ("paper", "released")


def check_heads(channels: int, num_heads: int) -> None:
    """Check that heads have equally many channels."""
    if channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels; got {num_heads}")


def check_reading(attention: object, window_size: int) -> None:
    """Check the name of a reading of FCSA, for windows of a size."""
    if attention not in READINGS:
        raise ValueError(f"attention must be one of {', '.join(READINGS)}; got {attention!r}")
    if attention == "released" and window_size % 2:
        raise ValueError(f"window_size must be even where attention is released; got {window_size}")


@_fusion.stock
class FocalContextSelfAttention(Branch):
    """Focal context self-attention, FCSA (IPT-V2, section 3.3): PW and DW 3x3 to q, k, v, attention, PW.

    Args:
        channels: C.
        num_heads: heads, dividing C.
        window_size: p.
        bias: of the three convolutions.
        attention: "paper" or "released", the readings of what the paper leaves open.

    The paper's text: the second branch has cyclically shifted windows, and shares with the first one a temperature,
    which divides, and a token weight; ``top_weight`` and ``bottom_weight``, from 0.5, multiply the branches by position
    in the unshifted window. The code that the authors released with a later model (U-DiT): the shifted windows lie in
    the interior, so that what is nearer to the edges than p/2 pixels has the first branch only, and p is even; each
    branch has a temperature, which multiplies, and a token weight of its own; ``top_weight`` m1 and ``bottom_weight``
    m2, from 1 and each by position in the windows of its own branch, merge them as (m1 F1 + m2 F2) / (m1 + m2).

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.
    """

    layer_operator = "focal_attention_layer"
    attention = "paper"  # of modules that were pickled before there was another reading

    def __init__(
        self, channels: int, num_heads: int, window_size: int, bias: bool = False, attention: str = "paper"
    ) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, num_heads=num_heads, window_size=window_size)
        _check.flags(bias=bias)
        check_heads(channels, num_heads)
        check_reading(attention, window_size)
        self.channels = channels
        self.num_heads = num_heads
        self.window_size = window_size
        self.attention = attention
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project = nn.Conv2d(channels, channels, 1, bias=bias)
        branches, start = ((), 0.5) if attention == "paper" else ((2,), 1.0)
        window = (window_size, window_size)
        self.temperature = nn.Parameter(torch.ones(*branches, num_heads))
        self.token_weight = nn.Parameter(torch.ones(*branches, num_heads, *window))
        self.top_weight = nn.Parameter(torch.full((num_heads, *window), start))
        self.bottom_weight = nn.Parameter(torch.full((num_heads, *window), start))

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        qkv = self.depthwise(self.qkv(x))
        return self.project(self.operators.focal_channel_attention(qkv, **self._core_arguments()))

    def changed_inside(self) -> str | None:
        return _fusion.first(
            qkv=_fusion.pointwise(self.qkv),
            depthwise=_fusion.depthwise(self.depthwise, 3),
            project=_fusion.pointwise(self.project),
        )

    def branch_arguments(self) -> dict[str, Any]:
        return dict(
            qkv_weight=self.qkv.weight,
            depthwise_weight=self.depthwise.weight,
            project_weight=self.project.weight,
            qkv_bias=self.qkv.bias,
            depthwise_bias=self.depthwise.bias,
            project_bias=self.project.bias,
            **self._core_arguments(),
        )

    def _core_arguments(self) -> dict[str, Any]:
        """The arguments of :func:`ipt_fast.ops.focal_channel_attention` but q, k and v."""
        found: dict[str, Any] = dict(
            temperature=self.temperature,
            token_weight=self.token_weight,
            top_weight=self.top_weight,
            bottom_weight=self.bottom_weight,
            num_heads=self.num_heads,
            window_size=self.window_size,
        )
        if self.attention == "paper":
            return found
        # The operator divides by temperatures, and wants both merge weights by position in the unshifted window.
        shift = self.window_size // 2
        bottom = torch.roll(self.bottom_weight, (shift, shift), (1, 2))
        total = self.top_weight + bottom
        found |= dict(top_weight=self.top_weight / total, bottom_weight=bottom / total)
        return found | dict(temperature=self.temperature.reciprocal(), cyclic=False)

    def layer(self, x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        return super().layer(x, norm, modulation)


@_fusion.stock
class GlobalGridSelfAttention(Branch):
    """Global grid self-attention, GGSA (IPT-V2, section 3.4): PW to q, k, v, attention on dilated lattices, PW.

    Args:
        channels: C.
        num_heads: heads, dividing C.
        grid_size: g.
        bias: of the two convolutions.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.
    """

    layer_operator = "grid_attention_layer"

    def __init__(self, channels: int, num_heads: int, grid_size: int, bias: bool = False) -> None:
        super().__init__()
        _check.positive_ints(channels=channels, num_heads=num_heads, grid_size=grid_size)
        _check.flags(bias=bias)
        check_heads(channels, num_heads)
        self.channels = channels
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.project = nn.Conv2d(channels, channels, 1, bias=bias)
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

    def branch_arguments(self) -> dict[str, Any]:
        return dict(
            qkv_weight=self.qkv.weight,
            project_weight=self.project.weight,
            bias_table=self.bias_table,
            qkv_bias=self.qkv.bias,
            project_bias=self.project.bias,
            num_heads=self.num_heads,
            grid_size=self.grid_size,
        )

    def layer(self, x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
        _check.image(x, self.channels, self.qkv)
        return super().layer(x, norm, modulation)


@_fusion.stock
class ParallelAttention(_fusion.Fusable):
    """FCSA and GGSA of one map side by side, their outputs merged by a pointwise convolution 2C -> C (figure 8, right).

    The attentions are the operators that serve each of them alone; norm and projections run module by module.

    Args:
        channels, num_heads, window_size, grid_size, attention: of :class:`FocalContextSelfAttention` and
            :class:`GlobalGridSelfAttention`.

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.
    """

    def __init__(
        self, channels: int, num_heads: int, window_size: int, grid_size: int, attention: str = "paper"
    ) -> None:
        super().__init__()
        self.focal = FocalContextSelfAttention(channels, num_heads, window_size, attention=attention)
        self.grid = GlobalGridSelfAttention(channels, num_heads, grid_size)
        self.merge = Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([self.focal(x), self.grid(x)], dim=1))
