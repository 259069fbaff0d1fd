"""Convolutions of SPAN (Wan et al., CVPRW 2024), which are three convolutions and a shortcut, merged to one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import convolve, parts_below
from ._rule import Rule, expect, expect_type, reason


def _check(module: Any) -> None:
    expand, middle, project = module.conv
    convolutions = {"first": expand, "second": middle, "third": project, "shortcut": module.sk}
    for name, size in (("first", 1), ("second", 3), ("third", 1), ("shortcut", 1)):
        expect_convolution(name, convolutions[name], size, 0)
    expect_convolution("merged", module.eval_conv, 3, 1)
    expect_type(module, "sk", nn.Conv2d)
    # RTMoSR's convolution of that name, which is never merged, lacks it, and TemporalSPAN's notes that it is merged.
    expect(isinstance(module.has_relu, bool), "its has_relu is no bool")
    expect(not hasattr(module, "params_updated"), "it is merged in its first call")


def expect_convolution(name: str, conv: Any, size: int, padding: int) -> None:
    expect(type(conv) is nn.Conv2d and conv.bias is not None, f"its {name} convolution is another, or has no bias")
    found = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode
    wanted = (size, size), (padding, padding), (1, 1), (1, 1), 1, "zeros"
    expect(found == wanted, f"its {name} convolution has another kernel, padding, stride, dilation or groups")


def _forward(module: Any, x: Tensor) -> Tensor:
    if module.training:
        weight, bias = merged(module)
        x = F.conv2d(x, weight, bias, padding=1)
    else:
        # As the plain module: the merged parameters belong to its state, and are computed in every call, unless its
        # class computes them where it is set to eval mode.
        if type(module).train is nn.Module.train:
            with torch.no_grad():
                module.eval_conv.weight.data, module.eval_conv.bias.data = merged(module)
        x = convolve(x, module.eval_conv)
    return F.leaky_relu(x, negative_slope=0.05) if module.has_relu else x


def merged(module: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the 3 x 3 convolution that is the sum of the shortcut and of the three, one after the other.

    Zeros are around the input of the first of them, not of the second, so this holds at the border, too.
    """
    dtype = module.sk.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    (w1, b1), (w2, b2), (w3, b3) = ((conv.weight.to(wide), conv.bias.to(wide)) for conv in module.conv)
    last = w3.flatten(1)
    later = (last @ w2.flatten(1)).unflatten(1, (w2.shape[1], -1))  # (outputs, channels between, 9)
    weight = (w1.flatten(1).T @ later).unflatten(2, (3, 3)) + F.pad(module.sk.weight.to(wide), (1, 1, 1, 1))
    bias = later.sum(-1) @ b1 + last @ b2 + b3 + module.sk.bias.to(wide)
    return weight.to(dtype), bias.to(dtype)


RULES = (Rule("SPAN convolution", ("Conv3XC",), reason(_check), parts_below, _forward, arguments=("x",)),)
