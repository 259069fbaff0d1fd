"""DiT (Peebles and Xie, Scalable Diffusion Models with Transformers, ICCV 2023), with which latent IPT-V2 is compared.

Parameters are named as in the published files.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import _check
from ..modules.convolution import Conv2d
from ._generator import Generator, GeneratorConfig, LabelEmbedding, TimestepEmbedding, timestep_features, zeroed
from ._pretrained import Preset
from ._registry import register


@dataclasses.dataclass(frozen=True)
class DiTConfig(GeneratorConfig):
    """Shape of a DiT; the defaults are DiT-S/2: 32.87 M parameters, 6.06 GMAC.

    Args:
        patch_size: side of the patches that become tokens; divides ``sample_size``.
        width: D, channels of a token; a multiple of 4, for positions of two axes by sines and cosines.
        layers: blocks.
        heads: of each attention; divides ``width``.
        ffn_ratio: hidden channels of the feed-forward networks over D.

    The others are those of :class:`GeneratorConfig`.
    """

    patch_size: int = 2
    width: int = 384
    layers: int = 12
    heads: int = 6
    ffn_ratio: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("patch_size", "width", "layers", "heads", "ffn_ratio")
        _check.positive_ints(**{name: getattr(self, name) for name in names})
        if self.sample_size % self.patch_size:
            raise ValueError(f"patch_size must divide sample_size {self.sample_size}; got {self.patch_size}")
        if self.width % 4:
            raise ValueError(f"width must be a multiple of 4; got {self.width}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}; got {self.heads}")


def positions(side: int, width: int) -> Tensor:
    """Fixed positions (side^2, width) of a square of tokens: half of the channels tell the column, half the row."""
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (B, N, D) scaled by 1 + ``scale`` and shifted, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, D), with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU (its tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _modulation(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


class DiTBlock(nn.Module):
    """A transformer layer under adaLN-Zero: tokens (B, N, D), conditions (B, D) -> tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config.width), _norm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.mlp = FeedForward(config.width, config.ffn_ratio * config.width)
        self.adaLN_modulation = _modulation(config.width, 6)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(conditions).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Norm, modulation and the projection of tokens to patches: (B, N, D) -> (B, N, P P C)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = _norm(config.width)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = _modulation(config.width, 2)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditions).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbedding(nn.Module):
    """Patches of latents (B, C, H, W) to tokens (B, N, D), row by row."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


@register
class DiT(Generator):
    """A transformer on patches of latents, conditioned by adaLN-Zero; predicts noise and its variance.

    A new model returns zeros, as its final layer and all gates start there.

    Shape: latents (B, in_channels, S, S), timestep (B,), class_labels (B,) -> (B, out_channels, S, S), S the config's
    ``sample_size``. Timesteps are integers or floats from 0 to 999; labels int64 from 0, ``num_classes`` being "no
    label"; None where the model has no classes.

    Args:
        config: a :class:`DiTConfig`.
    """

    config_class = DiTConfig
    presets = {"dit_s_2": Preset({})}
    _config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.x_embedder = PatchEmbedding(config)
        self.register_buffer("pos_embed", positions(config.sample_size // config.patch_size, config.width)[None])
        self.t_embedder = TimestepEmbedding(config.width)
        if config.num_classes:
            self.y_embedder = LabelEmbedding(config.labels, config.width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def _initialise(self) -> None:
        """As the paper's section 3.2 and ViT have it: Xavier for products, gates and the final layer zero."""
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)
        for part in (*self.blocks, self.final_layer):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
            zeroed(part.adaLN_modulation[1])
        zeroed(self.final_layer.linear)

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        config = self._config
        _check.image(latents, config.in_channels, self.x_embedder.proj, name="latents")
        if latents.shape[2:] != (config.sample_size, config.sample_size):
            shape = (len(latents), config.in_channels, config.sample_size, config.sample_size)
            raise ValueError(f"latents must be {shape} for this model; got {tuple(latents.shape)}")
        class_labels = self._checked_conditions(latents, timestep, class_labels)
        conditions = self.t_embedder(timestep_features(timestep))
        if class_labels is not None:
            conditions = conditions + self.y_embedder(class_labels)
        x = self.x_embedder(latents) + self.pos_embed
        for block in self.blocks:
            x = block(x, conditions)
        return self._image_of(self.final_layer(x, conditions))

    def _image_of(self, patches: Tensor) -> Tensor:
        """(B, N, P P C) -> (B, C, S, S); the channels of a patch are rows, columns, colours."""
        size, side = self._config.patch_size, self._config.sample_size // self._config.patch_size
        rows = patches.unflatten(2, (size, size, -1)).unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
        return rows.reshape(patches.shape[0], -1, side * size, side * size)
