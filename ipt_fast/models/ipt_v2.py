"""IPT-V2 (Tu et al., IPT-V2: Efficient Image Processing Transformer using Hierarchical Attentions)."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FocalContextSelfAttention, GlobalGridSelfAttention, LayerNorm2d, RepLeFFN, _check, _fusion
from ..modules._layer import Branch as Branch
from ..modules._layer import Residuals, residual
from ..modules._layer import reason_against_fusing as reason_against_fusing
from ..modules.attention import ParallelAttention, check_reading
from ..modules.baseline_feed_forward import FeedForward, GatedFeedForward
from ..modules.convolution import Conv2d, downsampling, pixel_shuffle, upsampling
from ..modules.convolution import PixelShuffle as PixelShuffle
from ..modules.convolution import PixelUnshuffle as PixelUnshuffle
from ..modules.feed_forward import merged_form, reparameterize
from ..modules.padding import crop, pad_to_multiple
from ..modules.padding import pad_to_size as pad_to_size
from ._pretrained import Preset, PretrainedModel
from ._registry import register
from .contract import Contract, Memory, magnifies

NORMS = ("bias_free", "with_bias")
FEED_FORWARDS = ("rep_leffn", "leffn", "ffn", "gdfn")
# The attention of a stage's even layers and of its odd ones.
ORDERS = {
    "focal_grid": ("focal", "grid"),
    "grid_focal": ("grid", "focal"),
    "focal": ("focal", "focal"),
    "grid": ("grid", "grid"),
    "parallel": ("both", "none"),
}
SCALES = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class IPTV2Config:
    """Shape of an IPT-V2; the defaults are the paper's base model.

    Args:
        in_channels: 1 (gray), 3 (colour), 6 (two views side by side along the channels), or any other number.
        out_channels: the residual is the input; its mean over two views where in_channels is twice as many; gray
            repeated where in_channels is 1.
        width: C; the levels have C, 2C, 4C and 8C channels.
        depths: transformer layers of encoder levels 1 to 3 (the decoder mirrors them) and of the latent level;
            ``order`` says which attention each has.
        refinement: layers after the decoder, at 2C channels.
        heads: attention heads of the four levels; decoder level 1 and the refinement have those of level 2.
        window_size: p of FCSA.
        grid_size: g of GGSA.
        ffn_ratio: hidden width of the feed-forward network over its input width.
        inner_ratio: inner width of the sequential pointwise branches over the input width.
        norm: "bias_free" (un-centred numerator, no bias) or "with_bias" (ordinary layer norm).
        downsample_kernel: kernel of the convolution before pixel-unshuffle, odd.
        merged: the feed-forward networks hold merged weights instead of branches; only "rep_leffn" has branches.
        ffn: the feed-forward networks (table 7c): "rep_leffn"; "leffn", the same without branches; "ffn", without its
            depthwise convolution; "gdfn", Restormer's gated one, whose hidden channels are int(2.66 C), not by
            ``ffn_ratio``.
        order: the attentions of successive layers (tables 7b and 9): "focal_grid" alternates FCSA and GGSA,
            "grid_focal" begins with GGSA, "focal" and "grid" have one of the two only. "parallel" gives every other
            layer both of them side by side, and to the layer that follows none.
        scale: how many times larger than the input the output is, 1 to 4. The output convolution then has ``scale``
            squared times as many channels and pixel-shuffle makes the image of them; the residual is the input,
            enlarged bicubically.
        attention: the reading of FCSA, "paper" or "released", see
            :class:`ipt_fast.modules.FocalContextSelfAttention`.
    """

    in_channels: int = 3
    out_channels: int = 3
    width: int = 48
    depths: tuple[int, int, int, int] = (4, 6, 6, 8)
    refinement: int = 4
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    window_size: int = 32
    grid_size: int = 16
    ffn_ratio: int = 4
    inner_ratio: int = 2
    norm: str = "bias_free"
    downsample_kernel: int = 3
    merged: bool = False
    ffn: str = "rep_leffn"
    order: str = "focal_grid"
    scale: int = 1
    attention: str = "paper"

    def __post_init__(self) -> None:
        for name in ("depths", "heads"):
            if isinstance(value := getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
        positive = ("in_channels", "out_channels", "width", "window_size", "grid_size", "ffn_ratio", "inner_ratio")
        for name in (*positive, "downsample_kernel", "refinement"):
            value = getattr(self, name)
            if type(value) is not int or value < (name != "refinement"):
                raise ValueError(f"{name} must be a positive int; got {value!r}")
        for name, least in (("depths", 0), ("heads", 1)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 4 or any(type(v) is not int or v < least for v in value):
                raise ValueError(f"{name} must be four ints of at least {least}; got {value!r}")
        for level, heads in enumerate(self.heads):
            if (self.width << level) % heads:
                raise ValueError(f"heads must divide the width {self.width << level} of level {level + 1}; got {heads}")
        if self.width % 2:
            raise ValueError(f"width must be even, as downsampling halves it; got {self.width}")
        if self.downsample_kernel % 2 == 0:
            raise ValueError(f"downsample_kernel must be odd; got {self.downsample_kernel}")
        for name, known in (("norm", NORMS), ("ffn", FEED_FORWARDS), ("order", tuple(ORDERS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if type(self.scale) is not int or self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}; got {self.scale!r}")
        check_reading(self.attention, self.window_size)
        if type(self.merged) is not bool:
            raise ValueError(f"merged must be True or False; got {self.merged!r}")
        if self.in_channels not in (1, self.out_channels, 2 * self.out_channels):
            raise ValueError(
                f"in_channels must be 1, out_channels or twice out_channels; got {self.in_channels} and "
                f"out_channels={self.out_channels}"
            )


def _norm(channels: int, config: IPTV2Config) -> LayerNorm2d:
    with_bias = config.norm == "with_bias"
    return LayerNorm2d(channels, bias=with_bias, centered=with_bias)


def _feed_forward(channels: int, config: IPTV2Config) -> nn.Module:
    if config.ffn == "ffn":
        return FeedForward(channels, config.ffn_ratio)
    if config.ffn == "gdfn":
        return GatedFeedForward(channels)
    # A plain LeFFN is what Rep-LeFFN is once it is merged.
    merged = config.merged or config.ffn == "leffn"
    return RepLeFFN(channels, config.ffn_ratio, config.inner_ratio, merged=merged)


@_fusion.stock
class TransformerLayer(Residuals):
    """Half of a focal and global transformer block (eq. 1): attention and feed-forward, each normed and residual."""

    residuals = (("norm1", "attention"), ("norm2", "ffn"))

    def __init__(self, channels: int, attention: nn.Module, config: IPTV2Config) -> None:
        super().__init__()
        self.norm1 = _norm(channels, config)
        self.attention = attention
        self.norm2 = _norm(channels, config)
        self.ffn = _feed_forward(channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return residual(residual(x, self.norm1, self.attention), self.norm2, self.ffn)


@_fusion.stock
class FeedForwardLayer(Residuals):
    """The second layer of a block whose two attentions are side by side in the first one: feed-forward alone."""

    residuals = (("norm2", "ffn"),)

    def __init__(self, channels: int, config: IPTV2Config) -> None:
        super().__init__()
        self.norm2 = _norm(channels, config)
        self.ffn = _feed_forward(channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return residual(x, self.norm2, self.ffn)


def _stage(config: IPTV2Config, channels: int, heads: int, depth: int) -> nn.Sequential:
    """``depth`` layers in the config's order."""

    def layer(kind: str) -> Residuals:
        if kind == "none":
            return FeedForwardLayer(channels, config)
        if kind == "focal":
            reading = config.attention
            attention: nn.Module = FocalContextSelfAttention(channels, heads, config.window_size, attention=reading)
        elif kind == "grid":
            attention = GlobalGridSelfAttention(channels, heads, config.grid_size)
        else:
            attention = ParallelAttention(channels, heads, config.window_size, config.grid_size, config.attention)
        return TransformerLayer(channels, attention, config)

    kinds = ORDERS[config.order]
    return nn.Sequential(*(layer(kinds[i % 2]) for i in range(depth)))


_TINY = dict(width=16, depths=(1, 2, 2, 1), refinement=0, window_size=16, grid_size=8, ffn_ratio=2, inner_ratio=1)


@register
class IPTV2(PretrainedModel):
    """IPT-V2, a U-shaped transformer for image restoration (section 3.2, table 10).

    Shape: (B, in_channels, H, W) -> (B, out_channels, scale H, scale W), any H and W from 1, values nominally in
    [0, 1].

    Args:
        config: an :class:`IPTV2Config`.
    """

    config_class = IPTV2Config
    free_fields = frozenset({"merged"})
    records_config = True
    presets = {
        "ipt_v2_tiny": Preset(
            _TINY,
            ships=True,
            trained_for="Gaussian noise of any σ up to 50 (of 255) in colour and gray photos, of each channel alone "
            "or shared by them; that of cameras is for ipt_v2_tiny_camera",
        ),
        "ipt_v2_tiny_camera": Preset(
            _TINY, ships=True, trained_for="noise of cameras in colour photos, as JPEG or developed from raw files"
        ),
        "ipt_v2_tiny_derain": Preset(
            _TINY, ships=True, trained_for="light rain: streaks in colour photos; thin bright lines may go, too"
        ),
        "ipt_v2_tiny_deblur": Preset(
            _TINY, ships=True, trained_for="slight motion blur in colour photos; a small model that learned from little"
        ),
        "ipt_v2_small": Preset(dict(width=32, depths=(4, 6, 6, 8), refinement=0, window_size=32, grid_size=8)),
        "ipt_v2_base": Preset(dict(width=48, depths=(4, 6, 6, 8), refinement=4, window_size=32, grid_size=16)),
        "ipt_v2_base_plus": Preset(dict(width=48, depths=(6, 8, 8, 10), refinement=6, window_size=32, grid_size=16)),
    }

    def __init__(self, config: IPTV2Config) -> None:
        super().__init__()
        if not isinstance(config, IPTV2Config):
            raise TypeError(f"config must be an IPTV2Config; got {type(config).__name__}")
        self._config = config
        width, depths, heads = config.width, config.depths, config.heads
        self.embed = Conv2d(config.in_channels, width, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(_stage(config, width << i, heads[i], depths[i]) for i in range(3))
        self.down = nn.ModuleList(downsampling(width << i, config.downsample_kernel) for i in range(3))
        self.latent = _stage(config, width << 3, heads[3], depths[3])
        self.up = nn.ModuleList(upsampling(width << (i + 1)) for i in range(3))
        # Level 1 keeps the concatenation, so its decoder and the refinement are as wide as level 2.
        self.reduce = nn.ModuleList(Conv2d(width << (i + 1), width << i, 1, bias=False) for i in (1, 2))
        self.decoder = nn.ModuleList(_stage(config, width << max(i, 1), heads[max(i, 1)], depths[i]) for i in range(3))
        self.refinement = _stage(config, 2 * width, heads[1], config.refinement)
        self.output = Conv2d(2 * width, config.out_channels * config.scale**2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self._config.in_channels, self.embed)
        height, width = x.shape[2:]
        features = self.embed(pad_to_multiple(x, 8).contiguous(memory_format=torch.channels_last))
        skips = []
        for encoder, down in zip(self.encoder, self.down, strict=True):
            skips.append(encoder(features))
            features = down(skips[-1])
        features = self.latent(features)
        for i in (2, 1, 0):
            features = torch.cat([self.up[i](features), skips[i]], dim=1)
            if i > 0:
                features = self.reduce[i - 1](features)
            features = self.decoder[i](features)
        features = crop(self.output(self.refinement(features)), height, width)
        if self._config.scale > 1:
            features = pixel_shuffle(features, self._config.scale)
        return features + self._residual(x)

    def _residual(self, x: Tensor) -> Tensor:
        config = self._config
        if config.in_channels == 2 * config.out_channels:
            x = (x[:, : config.out_channels] + x[:, config.out_channels :]) / 2
        if config.scale > 1:
            x = F.interpolate(x, scale_factor=float(config.scale), mode="bicubic")
        return x.expand(-1, config.out_channels, -1, -1)

    @classmethod
    def with_implied_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """``out_channels`` follows ``in_channels``: as many, and 3 for two views in 6 channels."""
        if "in_channels" not in fields:
            return fields
        channels = fields["in_channels"]
        return {"out_channels": 3 if channels == 6 else channels, **fields}

    @property
    def contract(self) -> Contract:
        """Images of any size, one thing to do; ``scale`` is the config's."""
        config = self.config
        return Contract(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            scale=magnifies(config.scale),
            memory=Memory.of_width(config.width),
            reparameterize=self.reparameterize,
        )

    @property
    def config(self) -> IPTV2Config:
        """The model's :class:`IPTV2Config`; ``merged`` tells the form that its Rep-LeFFNs have now.

        Raises:
            ValueError: some are merged and some are not, which no config describes.
        """
        if self._config.ffn != "rep_leffn":
            return self._config
        return dataclasses.replace(self._config, merged=merged_form(self, self._config.merged))

    def reparameterize(self) -> None:
        """Merge the branches of every Rep-LeFFN, in place; idempotent.

        Raises:
            ValueError: a branch is no plain convolution (any more): it has hooks, an adapter, a parametrisation.
                Nothing is merged then.
        """
        reparameterize(self)
        self._config = dataclasses.replace(self._config, merged=True)
