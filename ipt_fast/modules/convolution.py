"""The plain convolutions of the models."""

import platform

import torch
from torch import nn


def _emulated_dtypes():
    """The dtypes in which this processor has no arithmetic, so that oneDNN emulates them, many times slower."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return frozenset()
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    has_fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return frozenset(([] if has_bf16 else [torch.bfloat16]) + ([] if has_fp16 else [torch.float16]))


EMULATED = _emulated_dtypes()


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that computes bfloat16 and float16 in float32 on CPUs without instructions for them."""

    def _conv_forward(self, x, weight, bias):
        autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if x.device.type != "cpu" or x.dtype == torch.float64 or dtype not in EMULATED:
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return super()._conv_forward(x.float(), weight.float(), bias).to(dtype)
