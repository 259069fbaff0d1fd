"""Blocks of ECBSR (Zhang et al., ACM MM 2021): a convolution, its kin that see edges, and a shortcut, merged to one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._rule import Rule, expect, reason
from .span import expect_convolution

EDGES = ("conv1x1_sbx", "conv1x1_sby", "conv1x1_lpl")  # Sobel's in both directions, Laplace's


def _check(block: Any) -> None:
    expect_convolution("plain", block.conv3x3, 3, 1)
    outputs, inputs = block.conv3x3.weight.shape[:2]
    expand = block.conv1x1_3x3
    channels = len(expand.b0)
    _expect_shape("expanding", expand.k0, (channels, inputs, 1, 1))
    _expect_shape("squeezing", expand.k1, (outputs, channels, 3, 3))
    expect(len(expand.b1) == outputs, "its squeezing convolution has another bias")
    for name in EDGES:
        edge = getattr(block, name)
        _expect_shape(name, edge.k0, (outputs, inputs, 1, 1))
        _expect_shape(name, edge.mask, (outputs, 1, 3, 3))
        _expect_shape(name, edge.scale, (outputs, 1, 1, 1))
        expect(len(edge.b0) == len(edge.bias) == outputs, f"its {name} has another bias")
    found = {name for name, _ in block.named_children()}
    expect(found - {"act"} == {"conv3x3", "conv1x1_3x3", *EDGES}, "it has other branches")
    expect(block.act_type == "linear" or "act" in found, "it lacks an activation")
    expect(not block.with_idt or inputs == outputs, "its shortcut has another width")


def _expect_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    expect(tuple(tensor.shape) == wanted, f"its {name} has a weight of {tuple(tensor.shape)}")


def _forward(block: Any, x: Tensor) -> Tensor:
    """The plain block merges its branches in evaluation only, channel by channel."""
    weight, bias = merged(block)
    x = F.conv2d(x, weight, bias, padding=1)
    return x if block.act_type == "linear" else block.act(x)


def merged(block: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the 3 x 3 convolution that is the sum of all branches.

    Around what a first convolution returns lies its bias, as if zeros were around its input: so this holds at the
    border, too.
    """
    dtype = block.conv3x3.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = block.conv3x3.weight.to(wide), block.conv3x3.bias.to(wide)
    expand = block.conv1x1_3x3
    first, later = expand.k0.to(wide).flatten(1), expand.k1.to(wide).flatten(2)  # (M, inputs), (outputs, M, 9)
    weight = weight + (first.T @ later).unflatten(2, (3, 3))
    bias = bias + later.sum(-1) @ expand.b0.to(wide) + expand.b1.to(wide)
    for name in EDGES:
        edge = getattr(block, name)
        kernel = edge.scale.to(wide) * edge.mask.to(wide)
        weight = weight + kernel * edge.k0.to(wide)
        bias = bias + kernel.sum((1, 2, 3)) * edge.b0.to(wide) + edge.bias.to(wide)
    if block.with_idt:
        weight = weight + F.pad(torch.eye(len(weight)).to(weight)[..., None, None], (1, 1, 1, 1))
    return weight.to(dtype), bias.to(dtype)


def _parts(block: Any) -> list[nn.Module]:
    """All but the activation, which is called."""
    return [block.conv3x3, block.conv1x1_3x3, *(getattr(block, name) for name in EDGES)]


RULES = (Rule("ECBSR block", ("ECB",), reason(_check), _parts, _forward, arguments=("x",)),)
