"""Channel attention whose q comes from another map than k and v: CRAFT (Li et al., ICCV 2023), HVI-CIDNet (Yan et
al., CVPR 2025); and Retinexformer's (Cai et al., ICCV 2023), whose v is multiplied by features of illumination."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._layers import (
    check_channel_norm,
    convolve,
    expect_depthwise,
    expect_pointwise,
    normalised,
    parts_below,
    project,
)
from ._rule import Rule, expect, expect_type, reason
from .restormer import check_gated_feed_forward, feed_forward
from .swin import check_norm


def _check_attention(attention: Any) -> None:
    expect_pointwise(q=attention.q, kv=attention.kv, project_out=attention.project_out)
    expect_depthwise(3, q_dwconv=attention.q_dwconv, kv_dwconv=attention.kv_dwconv)
    expect(attention.kv.out_channels == 2 * attention.q.out_channels, "its q, k and v have other widths")
    heads = attention.temperature.numel()
    expect(heads == attention.num_heads, f"it has {heads} temperatures")


def _attend(x: Tensor, q: Tensor, kv: Tensor, attention: Any) -> Tensor:
    """x + attention with q of one map and k and v of another."""
    q = convolve(project(q, attention.q), attention.q_dwconv)
    k, v = convolve(project(kv, attention.kv), attention.kv_dwconv).chunk(2, dim=1)
    y = ops.channel_attention(q, k, v, attention.temperature, num_heads=attention.num_heads)
    return x + project(y, attention.project_out)


# -- CRAFT ------------------------------------------------------------------------------------------------------


def _check_fusion(block: Any) -> None:
    check_channel_norm(block, "norm1")
    check_channel_norm(block, "norm2")
    _check_attention(block.attn)
    check_gated_feed_forward(block.ffn)


def _forward_fusion(block: Any, low: Tensor, high: Tensor) -> Tensor:
    x = _attend(low, high, normalised(low, block.norm1), block.attn)
    return feed_forward(x, block.norm2, block.ffn).to(low.dtype)


# -- HVI-CIDNet: both maps by one norm, and a network with tanh, which stays as it is ---------------------------


def _check_lightweight(block: Any) -> None:
    check_channel_norm(block, "norm")
    _check_attention(block.ffn)


def _forward_hue(block: Any, x: Tensor, y: Tensor) -> Tensor:
    x = _attend(x, normalised(x, block.norm), normalised(y, block.norm), block.ffn)
    return block.gdfn(normalised(x, block.norm))


def _forward_intensity(block: Any, x: Tensor, y: Tensor) -> Tensor:
    x = _attend(x, normalised(x, block.norm), normalised(y, block.norm), block.ffn)
    return x + block.gdfn(normalised(x, block.norm))


def _parts_of_lightweight(block: Any) -> list[nn.Module]:
    return [block.gdfn, block.norm, *block.ffn.modules()]


# -- Retinexformer ----------------------------------------------------------------------------------------------


def _check_guided(block: Any) -> None:
    for attention, network in block.blocks:
        for name in ("to_q", "to_k", "to_v", "proj"):
            expect_type(attention, name, nn.Linear)
        first, activation, second = attention.pos_emb
        expect_depthwise(3, pos_emb=first, second_pos_emb=second)
        expect(attention.rescale.numel() == attention.num_heads, "it has other temperatures than heads")
        check_norm(network, "norm")
        expand, before, depthwise, after, project = network.fn.net
        expect_pointwise(expansion=expand, projection=project)
        expect_depthwise(3, depthwise=depthwise)
        kinds = {type(module).__name__ for module in (activation, before, after)}
        expect(kinds == {"GELU"}, f"its activations are {', '.join(sorted(kinds))}")


def _forward_guided(block: Any, x: Tensor, illu_fea: Tensor) -> Tensor:
    for attention, network in block.blocks:
        q, k, v = (project(x, to) for to in (attention.to_q, attention.to_k, attention.to_v))
        # The roles of q and k are exchanged.
        y = ops.channel_attention(k, q, v * illu_fea, attention.rescale, num_heads=attention.num_heads)
        first, _, second = attention.pos_emb
        x = x + project(y, attention.proj) + convolve(F.gelu(convolve(v, first)), second)
        x = _feed_forward(x, network.norm, network.fn.net)
    return x


def _feed_forward(x: Tensor, norm: nn.LayerNorm, network: Any) -> Tensor:
    expand, _, depthwise, _, project = network
    return ops.feed_forward_layer(
        x,
        norm.weight,
        norm.bias,
        expand.weight,
        depthwise.weight,
        project.weight,
        form="leff",
        expand_bias=expand.bias,
        depthwise_bias=depthwise.bias,
        project_bias=project.bias,
        eps=norm.eps,
    )


RULES = (
    Rule(
        "CRAFT fusion block", ("HFB",), reason(_check_fusion), parts_below, _forward_fusion,
        arguments=("low", "high"),
    ),
    Rule(
        "HVI-CIDNet block of hue", ("HV_LCA",), reason(_check_lightweight), _parts_of_lightweight, _forward_hue,
        arguments=("x", "y"),
    ),
    Rule(
        "HVI-CIDNet block of intensity", ("I_LCA",), reason(_check_lightweight), _parts_of_lightweight,
        _forward_intensity, arguments=("x", "y"),
    ),
    Rule(
        "Retinexformer block", ("IGAB",), reason(_check_guided), parts_below, _forward_guided,
        arguments=("x", "illu_fea"),
    ),
)  # fmt: skip
