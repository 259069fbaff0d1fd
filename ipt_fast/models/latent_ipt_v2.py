"""Latent IPT-V2: the backbone of IPT-V2 in the place of DiT's transformer (IPT-V2, section 4.4)."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FocalContextSelfAttention, GlobalGridSelfAttention, RepLeFFN, _check, _fusion
from ..modules._layer import Modulation, Residuals, residual
from ..modules.attention import check_reading
from ..modules.convolution import Conv2d, downsampling, upsampling
from ..modules.feed_forward import merged_form, reparameterize
from ..modules.normalization import ModulatedLayerNorm2d
from ..modules.transformer import without_autocast
from ._generator import Generator, GeneratorConfig, LabelEmbedding, TimestepEmbedding, timestep_features, zeroed
from ._pretrained import Preset
from ._registry import register
from .contract import Contract

LEVELS = 3
MULTIPLE = 1 << (LEVELS - 1)  # of the sides of latents: two levels lie below the first


@dataclasses.dataclass(frozen=True)
class LatentIPTV2Config(GeneratorConfig):
    """Shape of a latent IPT-V2; the defaults are IPTV2-S of the paper's table 6.

    The paper gives its cost, 6.24 GMAC, and no more. Here it is 6.36 (merged), with 41.3 M parameters (65.1 M while it
    is trained). The widths are multiples of 96 so that every head has 32 channels, which vector registers and the
    matrix units of GPUs take without a remainder. Level 1 is as deep as that of the restoration models. Between levels
    2 and 3 the rest of the cost is divided so that the model has few parameters for it (DiT-S/2 has 32.9 M): a layer of
    level 3 has four times as many as one of level 2 for the same cost, and with few images weights take longer to read
    than to multiply.

    Args:
        width: C; the levels have C, 2C and 4C channels, decoder level 1 has 2C.
        depths: transformer layers of encoder levels 1 and 2 (the decoder mirrors them) and of the latent level; the
            first of each has GGSA, the second FCSA, and so on.
        heads: attention heads of the three levels; decoder level 1 has those of level 2.
        window_size: p of FCSA, on maps that are larger; on others their side, or one more where that is odd.
        grid_size: g of GGSA, on maps that are larger; on others their side.
        ffn_ratio: hidden width of the feed-forward networks over their input width.
        inner_ratio: inner width of their sequential pointwise branches over the input width.
        attention: the reading of FCSA, "released" or "paper", see :class:`ipt_fast.modules.FocalContextSelfAttention`.
        merged: the feed-forward networks hold merged weights instead of branches.

    The others are those of :class:`GeneratorConfig`; ``sample_size`` is a multiple of 4.
    """

    width: int = 96
    depths: tuple[int, int, int] = (4, 8, 8)
    heads: tuple[int, int, int] = (3, 6, 12)
    window_size: int = 8
    grid_size: int = 8
    ffn_ratio: int = 4
    inner_ratio: int = 2
    attention: str = "released"
    merged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depths", "heads"):
            if isinstance(value := getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != LEVELS or any(type(v) is not int or v < 1 for v in value):
                raise ValueError(f"{name} must be three ints of at least 1; got {value!r}")
        names = ("width", "window_size", "grid_size", "ffn_ratio", "inner_ratio")
        _check.positive_ints(**{name: getattr(self, name) for name in names})
        _check.flags(merged=self.merged)
        check_reading(self.attention, self.window_size)
        if self.width % 2:
            raise ValueError(f"width must be even, as downsampling halves it; got {self.width}")
        for level, heads in enumerate(self.heads):
            if (self.width << level) % heads:
                raise ValueError(f"heads must divide the width {self.width << level} of level {level + 1}; got {heads}")
        if self.sample_size % MULTIPLE:
            raise ValueError(f"sample_size must be a multiple of {MULTIPLE}; got {self.sample_size}")

    def window_on(self, level: int) -> int:
        """p of FCSA on the maps of a level, 0 to 2."""
        side = self.sample_size >> level
        return min(self.window_size, side + side % 2)

    def grid_on(self, level: int) -> int:
        """g of GGSA on the maps of a level, 0 to 2."""
        return min(self.grid_size, self.sample_size >> level)


@_fusion.stock
class ModulatedLayer(Residuals):
    """Half of a block under adaLN-Zero: attention and feed-forward, each with modulated norm, gate and residual."""

    residuals = (("norm1", "attention"), ("norm2", "ffn"))

    def __init__(self, channels: int, attention: nn.Module, config: LatentIPTV2Config) -> None:
        super().__init__()
        self.norm1 = ModulatedLayerNorm2d()
        self.attention = attention
        self.norm2 = ModulatedLayerNorm2d()
        self.ffn = RepLeFFN(channels, config.ffn_ratio, config.inner_ratio, merged=config.merged, bias=True)

    def forward(self, x: Tensor, first: Modulation, second: Modulation) -> Tensor:
        return residual(residual(x, self.norm1, self.attention, first), self.norm2, self.ffn, second)


class Stage(nn.ModuleList):
    """``depth`` layers at ``channels`` channels on the maps of a level, global attention before focal."""

    def __init__(self, config: LatentIPTV2Config, level: int, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        for i in range(depth):
            if i % 2 == 0:
                attention: nn.Module = GlobalGridSelfAttention(channels, heads, config.grid_on(level), bias=True)
            else:
                window, reading = config.window_on(level), config.attention
                attention = FocalContextSelfAttention(channels, heads, window, bias=True, attention=reading)
            self.append(ModulatedLayer(channels, attention, config))

    def forward(self, x: Tensor, modulations: Iterator[Modulation]) -> Tensor:
        for layer in self:
            x = layer(x, next(modulations), next(modulations))
        return x


class Conditions(nn.Module):
    """What the layers of one width get of timestep and class: (B, 256) features, (B,) labels -> (B, width)."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.t_embedder = TimestepEmbedding(width)
        if labels:
            self.y_embedder = LabelEmbedding(labels, width)

    def forward(self, features: Tensor, class_labels: Tensor | None) -> Tensor:
        embedding = self.t_embedder(features)
        if class_labels is not None:
            embedding = embedding + self.y_embedder(class_labels)
        return F.silu(embedding)


class Modulations(nn.Module):
    """Those of all layers of one width by one product: (B, width) -> ``count`` modulations; their gates start at 0."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width = width
        self.linear = zeroed(nn.Linear(width, count * 3 * width))

    def forward(self, conditions: Tensor) -> list[Modulation]:
        rows = self.linear(conditions).unflatten(1, (-1, 3, self.width))
        shifts, scales, gates = rows.permute(2, 1, 0, 3).contiguous()
        parts = zip((1 + scales).unbind(), shifts.unbind(), gates.unbind(), strict=True)
        return [Modulation(*part) for part in parts]


class FinalLayer(nn.Module):
    """3 x 3 convolution, modulated norm, and the 3 x 3 convolution to the output, which starts at zero."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)
        self.norm = ModulatedLayerNorm2d()
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.output = zeroed(Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=1)
        return self.output(self.norm(self.conv(x), 1 + scale, shift))


@register
class LatentIPTV2(Generator):
    """A U-shaped transformer that predicts the noise in latents, conditioned by adaLN-Zero.

    A new model returns zeros, as its final layer and all gates start there.

    Shape: latents (B, in_channels, H, W), timestep (B,), class_labels (B,) -> (B, out_channels, H, W). H and W are any
    multiples of 4: ``sample_size`` by default, for which windows and grids are laid out. Timesteps are integers or
    floats from 0 to 999; labels int64 from 0, ``num_classes`` being "no label"; None where the model has no classes.

    Args:
        config: a :class:`LatentIPTV2Config`.
    """

    config_class = LatentIPTV2Config
    free_fields = frozenset({"merged"})
    presets = {"latent_ipt_v2_s": Preset({})}
    _config: LatentIPTV2Config

    def __init__(self, config: LatentIPTV2Config) -> None:
        super().__init__(config)
        width, depths, heads = config.width, config.depths, config.heads
        widths = [width << level for level in range(LEVELS)]
        self.conditions = nn.ModuleList(Conditions(each, config.labels) for each in widths)
        layers = (depths[0], depths[0] + 2 * depths[1], depths[2])  # decoder level 1 is as wide as level 2
        self.modulations = nn.ModuleList(Modulations(w, 2 * count) for w, count in zip(widths, layers, strict=True))
        self.embed = Conv2d(config.in_channels, width, 3, padding=1)
        self.encoder = nn.ModuleList(Stage(config, i, widths[i], heads[i], depths[i]) for i in (0, 1))
        self.down = nn.ModuleList(downsampling(widths[i]) for i in (0, 1))
        self.latent = Stage(config, 2, widths[2], heads[2], depths[2])
        self.up = nn.ModuleList(upsampling(widths[i + 1]) for i in (0, 1))
        self.reduce = nn.ModuleList(Conv2d(widths[i + 1], widths[1], 1) for i in (0, 1))
        self.decoder = nn.ModuleList(Stage(config, i, widths[1], heads[1], depths[i]) for i in (0, 1))
        self.final = FinalLayer(widths[1], config.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """As DiT's: Xavier for products at every pixel, biases zero; other convolutions as PyTorch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module.kernel_size == (1, 1) and module.groups == 1:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        _check.image(latents, self._config.in_channels, self.embed, name="latents")
        if latents.shape[2] % MULTIPLE or latents.shape[3] % MULTIPLE:
            raise ValueError(
                f"latents must have a height and a width that are multiples of {MULTIPLE}; got {tuple(latents.shape)}"
            )
        class_labels = self._checked_conditions(latents, timestep, class_labels)
        with without_autocast(latents):  # a few small products, by which every layer is scaled
            features = timestep_features(timestep)
            conditions = [each(features, class_labels) for each in self.conditions]
            first, second, third = (
                iter(each(vector)) for each, vector in zip(self.modulations, conditions, strict=True)
            )
            last = self.final.modulation(conditions[1])
        x = self.embed(latents.contiguous(memory_format=torch.channels_last))
        skips = []
        for encoder, down, modulations in zip(self.encoder, self.down, (first, second), strict=True):
            skips.append(encoder(x, modulations))
            x = down(skips[-1])
        x = self.latent(x, third)
        for i in (1, 0):
            x = self.reduce[i](torch.cat([self.up[i](x), skips[i]], dim=1))
            x = self.decoder[i](x, second)
        return self.final(x, last)

    @property
    def contract(self) -> Contract:
        """Latents of any size that is a multiple of 4."""
        return dataclasses.replace(super().contract, image_size=None)

    @property
    def config(self) -> LatentIPTV2Config:
        """The model's :class:`LatentIPTV2Config`; ``merged`` tells the form that its Rep-LeFFNs have now.

        Raises:
            ValueError: some are merged and some are not, which no config describes.
        """
        return dataclasses.replace(self._config, merged=merged_form(self, self._config.merged))

    def reparameterize(self) -> None:
        """Merge the branches of every Rep-LeFFN, in place; idempotent. Errors as :meth:`IPTV2.reparameterize`'s."""
        reparameterize(self)
        self._config = dataclasses.replace(self._config, merged=True)
