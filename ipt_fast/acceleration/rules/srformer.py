"""Blocks of SRFormer (Zhou et al., 2023): permuted self-attention, whose keys are of a map of half the size."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, inside, pointwise, reason
from .swin import check_norm, check_table, dense_bias, project


def _check(block: Any) -> None:
    check_norm(block, "norm1")
    check_norm(block, "norm2")
    attention, network = block.attn, block.mlp
    for name in ("q", "kv", "proj"):
        expect_type(attention, name, nn.Linear)
    expect(attention.kv.out_features * 2 == attention.q.out_features, "its kv is not of half the channels")
    window, inner = tuple(attention.window_size), tuple(attention.permuted_window_size)
    even = block.window_size % 2 == 0 and block.shift_size % 2 == 0
    expect(window == (block.window_size,) * 2 and even, "its windows or shifts are odd or of two sizes")
    expect(inner == (block.window_size // 2,) * 2, "its permuted windows are not of half the size")
    check_table(attention, inner)
    check_conv_ffn(network)


def check_conv_ffn(network: Any) -> None:
    """Linear, GELU, a depthwise convolution with GELU beside it, linear."""
    for name in ("fc1", "fc2"):
        expect_type(network, name, nn.Linear)
    expect_type(network, "act", nn.GELU)
    depthwise, activation = network.dwconv.depthwise_conv
    expect(type(activation) is nn.GELU, "its dwconv has another activation")
    expect(network.act.approximate == activation.approximate == "none", "its GELU is an approximation")
    check_depthwise(depthwise, network.fc1.out_features, (3, 5, 7))


def check_depthwise(conv: Any, channels: int, sizes: tuple[int, ...]) -> None:
    """A depthwise convolution of so many channels, of one of these sizes, that keeps the size of maps."""
    expect(type(conv) is nn.Conv2d and conv.groups == conv.out_channels == channels, "it has no depthwise convolution")
    expect(conv.kernel_size in [(size, size) for size in sizes], "its depthwise convolution is of another size")
    expect(conv.padding == tuple(size // 2 for size in conv.kernel_size), "its depthwise convolution changes sizes")
    plain = conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    expect(plain, "its depthwise convolution has strides, dilations or other padding")


def _forward(block: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    y = as_map(x + _attend(block, x, x_size), *x_size)
    return as_tokens(conv_ffn(y, block.norm2, block.mlp)).to(x.dtype)


def conv_ffn(x: Tensor, norm: Any, network: Any) -> Tensor:
    """x + network(norm(x)) of a map (B, C, H, W)."""
    depthwise = network.dwconv.depthwise_conv[0]
    return ops.feed_forward_layer(
        x,
        norm.weight,
        norm.bias,
        pointwise(network.fc1),
        depthwise.weight,
        pointwise(network.fc2),
        form="conv_ffn",
        expand_bias=network.fc1.bias,
        depthwise_bias=depthwise.bias,
        project_bias=network.fc2.bias,
        eps=norm.eps,
    )


def _attend(block: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    attention, norm = block.attn, block.norm1
    normed = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    keys, values = _halved(F.linear(normed, attention.kv.weight, attention.kv.bias), x_size)
    attended = ops.window_attention(
        project(normed, attention.q, x_size),
        keys,
        values,
        dense_bias(attention.relative_position_bias_table, attention.aligned_relative_position_index),
        num_heads=attention.num_heads,
        window_size=block.window_size,
        shift=block.shift_size,
        scale=attention.scale,
    )
    return F.linear(as_tokens(attended), attention.proj.weight, attention.proj.bias)


def _halved(kv: Tensor, x_size: tuple[int, int]) -> Tensor:
    """Keys and values (2, B, C, H/2, W/2) of tokens (B, N, C/2): the pixels of a square lie behind one another."""
    height, width = x_size[0] // 2, x_size[1] // 2
    squares = kv.reshape(kv.shape[0], height, 2, width, 2, 2, kv.shape[2] // 2).permute(5, 0, 1, 3, 2, 4, 6)
    return squares.reshape(2, kv.shape[0], height, width, -1).permute(0, 1, 4, 2, 3)


def _inactive(block: Any) -> str | None:
    return drops(block.drop_path, block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop)


RULES = (
    Rule("SRFormer block", ("PSA_Block",), reason(_check), inside, _forward, _inactive, arguments=("x", "x_size")),
)
