"""Restormer (Zamir et al., Restormer: Efficient Transformer for High-Resolution Image Restoration, CVPR 2022)."""

import os
from collections import OrderedDict
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..modules import LayerNorm2d, _check, _fusion
from ..modules._layer import Norm, Residuals, residual
from ..modules.convolution import Conv2d, downsampling, upsampling
from ..modules.gated_feed_forward import GatedFeedForward
from ..modules.padding import crop, pad_to_multiple
from ..modules.transposed_attention import TransposedAttention
from ._pretrained import Preset, PretrainedModel
from ._registry import register
from ._restormer_config import RestormerConfig, fields_of
from .checkpoint import load_state, read_state_dict
from .contract import Contract, Memory

# Of a forward pass, for each pixel of the input and each channel of ``width``. Measured as IPT-V2's, fp32, CPU: 292 by
# the references at 256 x 256; by the C++ kernels 74, frozen 54 and at 512 x 512 62.
BYTES_PER_PIXEL_AND_CHANNEL = 300
BYTES_WITH_FUSED_LAYERS = 75


@_fusion.stock
class NormWithBody(Norm):
    """:class:`ipt_fast.modules.LayerNorm2d` as ``body``, where the published files have its parameters.

    Args:
        channels: C.
        kind: "with_bias" or "bias_free", see :class:`RestormerConfig`.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        with_bias = kind == "with_bias"
        self.body = LayerNorm2d(channels, bias=with_bias, centered=with_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def changed_inside(self) -> str | None:
        return _fusion.first(body=_fusion.changed(self.body) or self._other_body())

    def _other_body(self) -> str | None:
        return None if isinstance(self.body, LayerNorm2d) else f"it is a {type(self.body).__name__}"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # is the body's
        return self.body.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.body.bias

    @property
    def eps(self) -> float:  # type: ignore[override]
        return self.body.eps

    @property
    def centered(self) -> bool:  # type: ignore[override]
        return self.body.centered


@_fusion.stock
class TransformerBlock(Residuals):
    """x + MDTA(LN(x)), then x + GDFN(LN(x)) (section 3). Submodules are named as in the published files.

    Args:
        channels: C.
        heads: of the attention.
        window: side of the windows that attention sees in eval mode, or None for the whole image.
        config: of the model.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    residuals = (("norm1", "attn"), ("norm2", "ffn"))

    def __init__(self, channels: int, heads: int, window: int | None, config: RestormerConfig) -> None:
        super().__init__()
        self.norm1 = NormWithBody(channels, config.norm)
        self.attn = TransposedAttention(channels, heads, config.bias, window)
        self.norm2 = NormWithBody(channels, config.norm)
        self.ffn = GatedFeedForward(channels, config.ffn_ratio, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return residual(residual(x, self.norm1, self.attn), self.norm2, self.ffn)


def _named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after the other, under their names in the published files."""
    return nn.Sequential(OrderedDict(modules))


@register
class Restormer(PretrainedModel):
    """Restormer, a U-shaped transformer for image restoration whose attention is between channels (section 3).

    The keys of its state dict are those of the published files.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H, W), any H and W from 1, values nominally in [0, 1].

    Args:
        config: a :class:`RestormerConfig`.
    """

    config_class = RestormerConfig
    free_fields = frozenset({"training_patch"})
    shape_is_in_weights = True
    presets = {
        "restormer": Preset({}),
        "restormer_denoising": Preset({"norm": "bias_free"}),
        "restormer_dual_pixel": Preset({"in_channels": 6, "dual_pixel": True}),
        "restormer_local": Preset({"training_patch": 256}),
    }

    def __init__(self, config: RestormerConfig) -> None:
        super().__init__()
        if not isinstance(config, RestormerConfig):
            raise TypeError(f"config must be a RestormerConfig; got {type(config).__name__}")
        self.config = config
        width, depths, bias = config.width, config.depths, config.bias

        def stage(level: int, channels: int, depth: int) -> nn.Sequential:
            heads, window = config.heads[level], config.window_on(level)
            return nn.Sequential(*(TransformerBlock(channels, heads, window, config) for _ in range(depth)))

        self.patch_embed = _named(proj=Conv2d(config.in_channels, width, 3, padding=1, bias=False))
        self.encoder_level1 = stage(0, width, depths[0])
        self.down1_2 = _named(body=downsampling(width))
        self.encoder_level2 = stage(1, 2 * width, depths[1])
        self.down2_3 = _named(body=downsampling(2 * width))
        self.encoder_level3 = stage(2, 4 * width, depths[2])
        self.down3_4 = _named(body=downsampling(4 * width))
        self.latent = stage(3, 8 * width, depths[3])
        self.up4_3 = _named(body=upsampling(8 * width))
        self.reduce_chan_level3 = Conv2d(8 * width, 4 * width, 1, bias=bias)
        self.decoder_level3 = stage(2, 4 * width, depths[2])
        self.up3_2 = _named(body=upsampling(4 * width))
        self.reduce_chan_level2 = Conv2d(4 * width, 2 * width, 1, bias=bias)
        self.decoder_level2 = stage(1, 2 * width, depths[1])
        self.up2_1 = _named(body=upsampling(2 * width))
        # Level 1 keeps the concatenation, so its decoder and the refinement are twice as wide as its encoder.
        self.decoder_level1 = stage(0, 2 * width, depths[0])
        self.refinement = stage(0, 2 * width, config.refinement)
        if config.dual_pixel:
            self.skip_conv = Conv2d(width, 2 * width, 1, bias=bias)
        self.output = Conv2d(2 * width, config.out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        _check.image(x, self.config.in_channels, getattr(self.patch_embed, "proj", None))
        height, width = x.shape[2:]
        embedded = self.patch_embed(pad_to_multiple(x, 8).contiguous(memory_format=torch.channels_last))
        first = self.encoder_level1(embedded)
        second = self.encoder_level2(self.down1_2(first))
        third = self.encoder_level3(self.down2_3(second))
        y = self.latent(self.down3_4(third))
        y = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(y), third], dim=1)))
        y = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(y), second], dim=1)))
        y = self.refinement(self.decoder_level1(torch.cat([self.up2_1(y), first], dim=1)))
        if self.config.dual_pixel:
            return crop(self.output(y + self.skip_conv(embedded)), height, width)
        return crop(self.output(y), height, width) + x

    @property
    def contract(self) -> Contract:
        """Images of any size, one thing to do."""
        config = self.config
        memory = Memory(BYTES_PER_PIXEL_AND_CHANNEL * config.width, BYTES_WITH_FUSED_LAYERS * config.width)
        return Contract(in_channels=config.in_channels, out_channels=config.out_channels, memory=memory)

    @classmethod
    def with_implied_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """``out_channels`` follows ``in_channels``: as many; 6 are two views, from which 3 are made (dual pixel)."""
        if "in_channels" not in fields:
            return fields
        channels = fields["in_channels"]
        implied = {"out_channels": 3, "dual_pixel": True} if channels == 6 else {"out_channels": channels}
        return {**implied, **fields}

    @classmethod
    def fields_told_by(cls, state: dict[str, Tensor]) -> dict[str, Any] | None:
        try:
            return fields_of(state, "the file")
        except ValueError:
            return None

    @classmethod
    def open_weights(
        cls, path: str | os.PathLike[str], preset: str, *, average: bool | None = None, **fields: Any
    ) -> Self:
        """The model of a file of weights, in eval mode.

        The weights tell its shape, the preset and ``fields`` only the ``training_patch``.

        Raises:
            ValueError: the file holds no Restormer, or another one than ``fields`` say.
        """
        state = read_state_dict(path, average=average)
        told = fields_of(state, path)
        for name, value in fields.items():
            if told.get(name, value) != (tuple(value) if isinstance(value, list) else value):
                raise ValueError(f"{name} must be {told[name]} as in {path}; got {value!r}")
        model = cls.from_fields({**cls.presets[preset].config, **told, **fields})
        load_state(model, state, path)
        return model.eval()
