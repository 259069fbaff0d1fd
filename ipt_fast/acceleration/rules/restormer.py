"""Blocks of Restormer (Zamir et al., CVPR 2022), and the parts of them that other models have."""

from typing import Any

from torch import Tensor

from ... import ops
from ._layers import check_channel_norm, expect_depthwise, expect_pointwise, norm_of, parts_below
from ._rule import Rule, expect, reason
from ._weights import run_layer


def check_channel_attention(attention: Any) -> None:
    """Restormer's channel attention: pointwise and depthwise convolutions to q, k, v, a temperature a head."""
    expect_pointwise(qkv=attention.qkv, project_out=attention.project_out)
    expect_depthwise(3, qkv_dwconv=attention.qkv_dwconv)
    heads, channels = attention.temperature.numel(), attention.qkv.in_channels
    expect(heads == heads_of(attention), f"it has {heads} temperatures")
    expect(attention.qkv.out_channels == 3 * channels, "its q, k and v have other widths")


def check_gated_feed_forward(network: Any) -> None:
    """Restormer's gated feed-forward network: one half of a depthwise convolution gates the other."""
    expect_pointwise(project_in=network.project_in, project_out=network.project_out)
    expect_depthwise(3, dwconv=network.dwconv)


def heads_of(attention: Any) -> int:
    return attention.num_heads if hasattr(attention, "num_heads") else attention.heads


def attend_to_channels(
    x: Tensor, norm: Any, attention: Any, window_size: int | None = None, dilation: int | None = None
) -> Tensor:
    """x + attention(norm(x)) of a map (B, C, H, W), among the channels of a group of pixels."""
    return run_layer(ops.channel_attention_layer, x, _attention, attention, norm, window_size, dilation)


def _attention(attention: Any, norm: Any, window_size: int | None, dilation: int | None) -> dict[str, Any]:
    return dict(
        **norm_of(norm),
        qkv_weight=attention.qkv.weight,
        depthwise_weight=attention.qkv_dwconv.weight,
        project_weight=attention.project_out.weight,
        temperature=attention.temperature.flatten(),
        qkv_bias=attention.qkv.bias,
        depthwise_bias=attention.qkv_dwconv.bias,
        project_bias=attention.project_out.bias,
        num_heads=heads_of(attention),
        window_size=window_size,
        dilation=dilation,
    )


def feed_forward(x: Tensor, norm: Any, network: Any) -> Tensor:
    """x + network(norm(x)) of a map (B, C, H, W)."""
    return run_layer(ops.feed_forward_layer, x, _feed_forward, network, norm)


def _feed_forward(network: Any, norm: Any) -> dict[str, Any]:
    return dict(
        **norm_of(norm),
        expand_weight=network.project_in.weight,
        depthwise_weight=network.dwconv.weight,
        project_weight=network.project_out.weight,
        form="gdfn",
        expand_bias=network.project_in.bias,
        depthwise_bias=network.dwconv.bias,
        project_bias=network.project_out.bias,
    )


# -- Restormer --------------------------------------------------------------------------------------------------


def _check(block: Any) -> None:
    check_channel_norm(block, "norm1")
    check_channel_norm(block, "norm2")
    check_channel_attention(block.attn)
    check_gated_feed_forward(block.ffn)


def _forward(block: Any, x: Tensor) -> Tensor:
    return feed_forward(attend_to_channels(x, block.norm1, block.attn), block.norm2, block.ffn).to(x.dtype)


# -- KBNet (Zhang et al., 2023), whose feed-forward network mixes kernels and stays as it is --------------------


def _check_kernel_basis(block: Any) -> None:
    check_channel_norm(block, "norm2")
    check_channel_attention(block.ffn)


def _forward_kernel_basis(block: Any, x: Tensor) -> Tensor:
    x = x + block.attn(block.norm1(x))
    return attend_to_channels(x, block.norm2, block.ffn).to(x.dtype)


RULES = (
    Rule("Restormer block", ("TransformerBlock",), reason(_check), parts_below, _forward),
    Rule(
        "KBNet block",
        ("KBBlock_l",),
        reason(_check_kernel_basis),
        lambda block: [block.attn, *block.norm2.modules(), *block.ffn.modules()],
        _forward_kernel_basis,
    ),
)
