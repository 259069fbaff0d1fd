"""The plain convolutions of the models."""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _fusion


def _emulated_dtypes() -> frozenset[torch.dtype]:
    """The dtypes in which this processor has no arithmetic, so that oneDNN emulates them, many times slower."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return frozenset()
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    has_fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return frozenset(([] if has_bf16 else [torch.bfloat16]) + ([] if has_fp16 else [torch.float16]))


EMULATED = _emulated_dtypes()


@_fusion.stock
class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that computes bfloat16 and float16 in float32 on CPUs without instructions for them."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if x.device.type != "cpu" or x.dtype == torch.float64 or dtype not in EMULATED:
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return super()._conv_forward(x.float(), weight.float(), bias).to(dtype)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_shuffle``, which returns an empty batch in its old shape, for any batch."""
    if x.shape[0] > 0:  # not len(x), which would tie a compiled graph to one batch
        return F.pixel_shuffle(x, factor)
    return x.flatten()[:0].view(0, x.shape[1] // factor**2, x.shape[2] * factor, x.shape[3] * factor)


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_unshuffle``, which returns an empty batch in its old shape, for any batch."""
    if x.shape[0] > 0:
        return F.pixel_unshuffle(x, factor)
    return x.flatten()[:0].view(0, x.shape[1] * factor**2, x.shape[2] // factor, x.shape[3] // factor)


class PixelShuffle(nn.PixelShuffle):
    """``nn.PixelShuffle`` that takes empty batches, too."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(x, self.upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle):
    """``nn.PixelUnshuffle`` that takes empty batches, too."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(x, self.downscale_factor)
