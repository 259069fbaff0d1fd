"""Blocks of FDAT, the fast dual aggregation transformer (stinkybread, 2025)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._layers import (
    expect_depthwise,
    expect_gelu,
    expect_pointwise,
    expect_sequence,
    mean_of_pixels,
    parts_below,
    project,
)
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, pointwise, reason
from .swin import check_norm


def _check(block: Any) -> None:
    check_norm(block, "n1")
    check_norm(block, "n2")
    expect_type(block.attn, "qkv", nn.Linear)
    expect_type(block.attn, "proj", nn.Linear)
    expect(block.btype == ("spatial" if hasattr(block.attn, "ws") else "channel"), f"its btype is {block.btype}")
    expect_sequence("conv", block.conv, nn.Conv2d, nn.GELU)
    spatial, channel = block.inter.sg, block.inter.cg
    expect_sequence("sg", spatial, nn.Conv2d, nn.Sigmoid)
    expect_sequence("cg", channel, nn.AdaptiveAvgPool2d, nn.Conv2d, nn.GELU, nn.Conv2d, nn.Sigmoid)
    expect_depthwise(3, conv=block.conv[0], smix=block.ffn.smix)
    expect_pointwise(sg=spatial[0], reduction=channel[1], restoration=channel[3])
    expect_type(block.ffn, "fc1", nn.Linear)
    expect_type(block.ffn, "fc2", nn.Linear)
    expect_gelu("act", block.ffn.act)


def _forward(block: Any, x: Tensor, height: int, width: int) -> Tensor:
    branch = _attend_in_windows if block.btype == "spatial" else _attend_to_channels
    return as_tokens(_feed_forward(branch(block, as_map(x, height, width)), block.n2, block.ffn)).to(x.dtype)


def _attend_in_windows(block: Any, x: Tensor) -> Tensor:
    """x + attention, whose channels are gated by the convolution, + the convolution."""
    convolved = _convolve(block, x)
    _, reduce, _, restore, _ = block.inter.cg
    gate = project(F.gelu(project(mean_of_pixels(convolved), reduce)), restore).sigmoid()
    attention, size = block.attn, block.attn.ws
    heads = dict(num_heads=attention.nh, window_size=size, scale=attention.scale)
    below, right = -x.shape[2] % size, -x.shape[3] % size
    if below or right:  # normalised pixels of zeros take part
        y = F.pad(_normalise(block, x), (0, right, 0, below))
        q, k, v = project(y, attention.qkv).chunk(3, dim=1)
        y = ops.window_attention(q, k, v, attention.bias, **heads)[..., : x.shape[2], : x.shape[3]]
        return x + torch.addcmul(convolved, project(y, attention.proj), gate)
    y = ops.window_attention_layer(
        x,
        block.n1.weight,
        block.n1.bias,
        pointwise(attention.qkv),
        pointwise(attention.proj),
        attention.bias,
        qkv_bias=attention.qkv.bias,
        project_bias=attention.proj.bias,
        gate=gate.flatten(1),
        eps=block.n1.eps,
        **heads,
    )
    return convolved.add_(y)  # nothing else reads it


def _attend_to_channels(block: Any, x: Tensor) -> Tensor:
    """x + attention + the convolution, whose pixels are gated by the attention."""
    attention = block.attn
    y = ops.channel_attention_layer(
        x,
        block.n1.weight,
        block.n1.bias,
        pointwise(attention.qkv),
        None,
        pointwise(attention.proj),
        attention.temp,
        qkv_bias=attention.qkv.bias,
        project_bias=attention.proj.bias,
        num_heads=attention.nh,
        eps=block.n1.eps,
        residual=False,
    )
    return torch.addcmul(x + y, _convolve(block, x), project(y, block.inter.sg[0]).sigmoid())


def _convolve(block: Any, x: Tensor) -> Tensor:
    conv, norm = block.conv[0], block.n1
    return ops.depthwise_layer(x, conv.weight, conv.bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)


def _normalise(block: Any, x: Tensor) -> Tensor:
    return ops.layer_norm_2d(x, block.n1.weight, block.n1.bias, eps=block.n1.eps)


def _feed_forward(x: Tensor, norm: nn.LayerNorm, network: Any) -> Tensor:
    return ops.feed_forward_layer(
        x,
        norm.weight,
        norm.bias,
        pointwise(network.fc1),
        network.smix.weight,
        pointwise(network.fc2),
        form="leffn",
        expand_bias=network.fc1.bias,
        depthwise_bias=network.smix.bias,
        project_bias=network.fc2.bias,
        eps=norm.eps,
    )


def _inactive(block: Any) -> str | None:
    return drops(block.dp, block.ffn.drop)


RULES = (
    Rule(
        "FDAT block",
        ("SimplifiedDATBlock",),
        reason(_check),
        parts_below,
        _forward,
        _inactive,
    ),
)
