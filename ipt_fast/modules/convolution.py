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


def taken_for_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's convolution takes the layout of a map for channels-last, also in axes of size 1."""
    if x.dim() != 4 or x.is_contiguous():  # maps of one channel or one pixel may have both layouts
        return False
    _, channels, height, width = x.shape
    return x.stride() == (height * width * channels, 1, width * channels, channels)


def _loses_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's shuffles of pixels would return a channels-last map in the other layout: only CPUs keep it."""
    return x.device.type != "cpu" and x.stride(1) == 1 and x.stride(3) == x.shape[1] > 1


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_shuffle`` for any batch, where PyTorch's returns an empty one in its old shape; channels-last maps stay
    so on every device."""
    if x.dim() != 4:
        return F.pixel_shuffle(x, factor)
    batch, channels, height, width = x.shape
    if batch == 0:  # not by len(x), which would tie a compiled graph to one batch
        return x.flatten()[:0].view(0, channels // factor**2, height * factor, width * factor)
    if channels % factor**2 or not _loses_channels_last(x):
        return F.pixel_shuffle(x, factor)
    parts = x.permute(0, 2, 3, 1).reshape(batch, height, width, channels // factor**2, factor, factor)
    rows = parts.permute(0, 1, 4, 2, 5, 3)
    return rows.reshape(batch, height * factor, width * factor, channels // factor**2).permute(0, 3, 1, 2)


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_unshuffle`` for any batch, where PyTorch's returns an empty one in its old shape; channels-last maps
    stay so on every device."""
    if x.dim() != 4:
        return F.pixel_unshuffle(x, factor)
    batch, channels, height, width = x.shape
    if batch == 0:
        return x.flatten()[:0].view(0, channels * factor**2, height // factor, width // factor)
    if height % factor or width % factor or not _loses_channels_last(x):
        return F.pixel_unshuffle(x, factor)
    parts = x.permute(0, 2, 3, 1).reshape(batch, height // factor, factor, width // factor, factor, channels)
    rows = parts.permute(0, 1, 3, 5, 2, 4)
    return rows.reshape(batch, height // factor, width // factor, channels * factor**2).permute(0, 3, 1, 2)


class PixelShuffle(nn.PixelShuffle):
    """``nn.PixelShuffle`` that takes empty batches, too."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(x, self.upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle):
    """``nn.PixelUnshuffle`` that takes empty batches, too."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(x, self.downscale_factor)


def downsampling(channels: int, kernel: int = 3) -> nn.Sequential:
    """(B, C, H, W) -> (B, 2C, H/2, W/2): a convolution to C/2 channels without bias, and pixel-unshuffle."""
    return nn.Sequential(Conv2d(channels, channels // 2, kernel, padding=kernel // 2, bias=False), PixelUnshuffle(2))


def upsampling(channels: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, C/2, 2H, 2W): a 3 x 3 convolution to 2C channels without bias, and pixel-shuffle."""
    return nn.Sequential(Conv2d(channels, 2 * channels, 3, padding=1, bias=False), PixelShuffle(2))
