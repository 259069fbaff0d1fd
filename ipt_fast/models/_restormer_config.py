"""The shape of a Restormer, given or read from a file of weights with the published names."""

import dataclasses
import math
import re
from fractions import Fraction
from typing import Any

from torch import Tensor

from ..modules import _check
from ..modules.gated_feed_forward import GATED_RATIO, check_ratio

NORMS = ("with_bias", "bias_free")
LEVELS = 4
STAGES = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")


@dataclasses.dataclass(frozen=True)
class RestormerConfig:
    """Shape of a Restormer; the defaults are the paper's model for rain and blur.

    Args:
        in_channels: of the images; 6 for two views (dual-pixel defocus deblurring).
        out_channels: as many, unless ``dual_pixel``.
        width: C; the levels have C, 2C, 4C and 8C channels, decoder level 1 and the refinement 2C.
        depths: transformer blocks of encoder levels 1 to 3 (the decoder mirrors them) and of the latent level.
        refinement: blocks after the decoder.
        heads: attention heads of the four levels; decoder level 1 and the refinement have those of level 1.
        ffn_ratio: the feed-forward networks have int(ffn_ratio * channels) hidden channels.
        bias: of the convolutions, but for the first one and those between levels.
        norm: "with_bias" (ordinary layer norm), or "bias_free" (un-centred numerator, no bias), as in the published
            models that remove noise.
        dual_pixel: a 1 x 1 convolution of the embedded input is added to the features that make the output, instead of
            the input to the output.
        training_patch: side in pixels of the patches that the model was trained on, a multiple of 8. In eval mode its
            attentions then see windows 1.5 times as large, halved from level to level (TLC, Chu et al., ECCV 2022).
            None: they see the whole image, as they do while the model is trained.
    """

    in_channels: int = 3
    out_channels: int = 3
    width: int = 48
    depths: tuple[int, int, int, int] = (4, 6, 6, 8)
    refinement: int = 4
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    ffn_ratio: float = GATED_RATIO
    bias: bool = False
    norm: str = "with_bias"
    dual_pixel: bool = False
    training_patch: int | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "heads"):
            if isinstance(value := getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != LEVELS or any(type(v) is not int or v < 1 for v in value):
                raise ValueError(f"{name} must be four ints of at least 1; got {value!r}")
        _check.positive_ints(**{name: getattr(self, name) for name in ("in_channels", "out_channels", "width")})
        _check.flags(bias=self.bias, dual_pixel=self.dual_pixel)
        if type(self.refinement) is not int or self.refinement < 0:
            raise ValueError(f"refinement must be an int of at least 0; got {self.refinement!r}")
        if self.width % 2:
            raise ValueError(f"width must be even, as downsampling halves it; got {self.width}")
        for level, heads in enumerate(self.heads):
            if (self.width << level) % heads:
                raise ValueError(f"heads must divide the width {self.width << level} of level {level + 1}; got {heads}")
        check_ratio("ffn_ratio", self.ffn_ratio, self.width)
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}")
        if not self.dual_pixel and self.in_channels != self.out_channels:
            raise ValueError(
                f"in_channels must be out_channels {self.out_channels} where dual_pixel is False, as the input is "
                f"added to the output; got {self.in_channels}"
            )
        patch = self.training_patch
        if patch is not None and (type(patch) is not int or patch < 8 or patch % 8):
            raise ValueError(f"training_patch must be a multiple of 8, or None; got {patch!r}")

    def window_on(self, level: int) -> int | None:
        """Side of the windows that attention sees in eval mode on the maps of a level, 0 to 3; None for all of them."""
        return None if self.training_patch is None else (3 * self.training_patch) >> (level + 1)


def fields_of(state: dict[str, Tensor], source: object) -> dict[str, Any]:
    """The fields of a :class:`RestormerConfig` that weights tell: all but ``training_patch``.

    Raises:
        ValueError: the weights are no Restormer's.
    """
    for name, rank in _needed():
        if name not in state:
            raise ValueError(f"path must hold a Restormer; got {source}, which lacks {name}")
        if state[name].dim() != rank or 0 in state[name].shape:
            shape = tuple(state[name].shape)
            raise ValueError(f"path must hold a Restormer; got {source}, whose {name} has shape {shape}")
    width, in_channels = state["patch_embed.proj.weight"].shape[:2]
    hidden = [state[f"{stage}.0.ffn.project_out.weight"].shape[1] for stage in STAGES]
    return {
        "in_channels": in_channels,
        "out_channels": state["output.weight"].shape[0],
        "width": width,
        "depths": tuple(_blocks(state, stage) for stage in STAGES),
        "refinement": _blocks(state, "refinement"),
        "heads": tuple(len(state[f"{stage}.0.attn.temperature"]) for stage in STAGES),
        "ffn_ratio": _ratio_of(hidden, width, source),
        "bias": "encoder_level1.0.attn.qkv.bias" in state,
        "norm": "with_bias" if "encoder_level1.0.norm1.body.bias" in state else "bias_free",
        "dual_pixel": "skip_conv.weight" in state,
    }


def _needed() -> list[tuple[str, int]]:
    """(name, rank) of the tensors that tell the shape."""
    of_stages = [("attn.temperature", 3), ("ffn.project_out.weight", 4)]
    stages = [(f"{stage}.0.{name}", rank) for stage in STAGES for name, rank in of_stages]
    return [("patch_embed.proj.weight", 4), ("output.weight", 4), *stages]


def _blocks(state: dict[str, Tensor], stage: str) -> int:
    found = (re.match(rf"{stage}\.(\d+)\.", name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _ratio_of(hidden: list[int], width: int, source: object) -> float:
    """The shortest decimal that gives the levels their hidden channels: 2.66 for the published models."""
    widths = [width << level for level in range(LEVELS)]
    least = max(Fraction(h, w) for h, w in zip(hidden, widths, strict=True))
    above = min(Fraction(h + 1, w) for h, w in zip(hidden, widths, strict=True))
    for digits in range(16):
        ratio = float(Fraction(math.ceil(least * 10**digits), 10**digits))
        if ratio < above and [int(ratio * w) for w in widths] == hidden:
            return ratio
    raise ValueError(f"path must have one ratio of hidden channels in all levels; got {hidden} in {source}")
