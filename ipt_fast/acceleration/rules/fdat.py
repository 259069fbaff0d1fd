"""Blocks of FDAT, the fast dual aggregation transformer (stinkybread, 2025)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._layers import (
    add,
    add_product,
    expect_depthwise,
    expect_gelu,
    expect_pointwise,
    expect_sequence,
    mean_of_pixels,
    parts_below,
    project,
)
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, pointwise, reason
from ._weights import run_layer
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
    y = branch(block, as_map(x, height, width))
    return as_tokens(run_layer(ops.feed_forward_layer, y, _feed_forward, block.ffn, block.n2)).to(x.dtype)


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
    y = run_layer(ops.window_attention_layer, x, _window_attention, attention, block.n1, gate=gate.flatten(1))
    return add(convolved, y)


def _window_attention(attention: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    return dict(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        qkv_weight=pointwise(attention.qkv),
        project_weight=pointwise(attention.proj),
        bias=attention.bias,
        qkv_bias=attention.qkv.bias,
        project_bias=attention.proj.bias,
        num_heads=attention.nh,
        window_size=attention.ws,
        scale=attention.scale,
        eps=norm.eps,
    )


def _attend_to_channels(block: Any, x: Tensor) -> Tensor:
    """x + attention + the convolution, whose pixels are gated by the attention."""
    y = run_layer(ops.channel_attention_layer, x, _channel_attention, block.attn, block.n1)
    return add_product(x + y, _convolve(block, x), project(y, block.inter.sg[0]).sigmoid())


def _channel_attention(attention: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    return dict(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        qkv_weight=pointwise(attention.qkv),
        depthwise_weight=None,
        project_weight=pointwise(attention.proj),
        temperature=attention.temp.flatten(),
        qkv_bias=attention.qkv.bias,
        project_bias=attention.proj.bias,
        num_heads=attention.nh,
        eps=norm.eps,
        residual=False,
    )


def _convolve(block: Any, x: Tensor) -> Tensor:
    conv, norm = block.conv[0], block.n1
    return ops.depthwise_layer(x, conv.weight, conv.bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)


def _normalise(block: Any, x: Tensor) -> Tensor:
    return ops.layer_norm_2d(x, block.n1.weight, block.n1.bias, eps=block.n1.eps)


def _feed_forward(network: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    return dict(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        expand_weight=pointwise(network.fc1),
        depthwise_weight=network.smix.weight,
        project_weight=pointwise(network.fc2),
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
