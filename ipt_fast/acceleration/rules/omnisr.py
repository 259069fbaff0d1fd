"""Blocks of OmniSR (Wang et al., CVPR 2023)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._layers import check_channel_norm, convolve, expect_depthwise, expect_gelu, expect_pointwise, parts_below, project
from ._rule import Rule, drops, expect, expect_type, pointwise, reason
from ._weights import run_layer
from .restormer import attend_to_channels, check_channel_attention, check_gated_feed_forward, feed_forward
from .swin import check_norm

# What the layers of a block are: a convolution; attention of windows, a network, channel attention of windows, a
# network; the same of grids. Between them maps are cut into windows and grids and put together again, or, here, not.
_LAYERS = (
    "MBConvResidual",
    "Rearrange", "PreNormResidual", "Rearrange", *("Conv_PreNormResidual",) * 3,
    "Rearrange", "PreNormResidual", "Rearrange", *("Conv_PreNormResidual",) * 3,
)  # fmt: skip
_OF_WINDOWS = ("b d (x w1) (y w2) -> b x y w1 w2 d", "b x y w1 w2 d -> b d (x w1) (y w2)")
_OF_GRIDS = ("b d (w1 x) (w2 y) -> b x y w1 w2 d", "b x y w1 w2 d -> b d (w1 x) (w2 y)")


def _check(block: Any) -> None:
    layers = block.layer
    expect(tuple(type(layer).__name__ for layer in layers) == _LAYERS, "its layers are others")
    for first, patterns in ((1, _OF_WINDOWS), (7, _OF_GRIDS)):
        expect((layers[first].pattern, layers[first + 2].pattern) == patterns, "its windows or grids are others")
        _check_attention(layers[first + 1])
        check_gated_feed_forward(_normalised(layers[first + 3]))
        check_channel_attention(_normalised(layers[first + 4]))
        check_gated_feed_forward(_normalised(layers[first + 5]))
    kinds = type(layers[5].fn).__name__, type(layers[11].fn).__name__
    expect(kinds == ("Channel_Attention", "Channel_Attention_grid"), f"its channel attentions are {kinds}")
    sizes = {_size(layers[1]), _size(layers[7]), layers[5].fn.ps, layers[11].fn.ps}
    expect(len(sizes) == 1, f"its windows and grids are of the sizes {sizes}")
    _check_convolution(layers[0].fn)


def _normalised(layer: Any) -> Any:
    check_channel_norm(layer, "norm")
    return layer.fn


def _size(rearrange: Any) -> int:
    sizes = dict(rearrange.axes_lengths)
    expect(sizes.get("w1") == sizes.get("w2"), "its windows are not square")
    return sizes["w1"]


def _check_attention(layer: Any) -> None:
    check_norm(layer, "norm")
    attention = layer.fn
    expect_type(attention, "to_qkv", nn.Linear)
    expect([type(part) for part in attention.to_out] == [nn.Linear, nn.Dropout], "its projection is another")
    expect([type(part) for part in attention.attend] == [nn.Softmax, nn.Dropout], "its softmax is another")


def _check_convolution(net: Any) -> None:
    expand, first, depthwise, second, excitation, last = net
    expect_pointwise(expansion=expand, projection=last)
    expect_depthwise(3, convolution=depthwise)
    expect_gelu("first activation", first)
    expect_gelu("second activation", second)
    linears = [part for part in excitation.gate if isinstance(part, nn.Linear)]
    expect(type(excitation).__name__ == "SqueezeExcitation" and len(linears) == 2, "its excitation is another")


def _forward(block: Any, x: Tensor) -> Tensor:
    layers = block.layer
    size = _size(layers[1])
    y = _convolve(x, layers[0].fn)
    y = run_layer(ops.window_attention_layer, y, _window_attention, layers[2], size)
    y = feed_forward(y, layers[4].norm, layers[4].fn)
    y = attend_to_channels(y, layers[5].norm, layers[5].fn, window_size=size)
    y = feed_forward(y, layers[6].norm, layers[6].fn)
    y = run_layer(ops.grid_attention_layer, y, _grid_attention, layers[8], size)
    y = feed_forward(y, layers[10].norm, layers[10].fn)
    y = attend_to_channels(y, layers[11].norm, layers[11].fn, dilation=size)
    return feed_forward(y, layers[12].norm, layers[12].fn).to(x.dtype)


def _convolve(x: Tensor, net: Any) -> Tensor:
    """x + the inverted bottleneck, whose squeeze and excitation gates channels by their means."""
    expand, _, depthwise, _, excitation, last = net
    y = F.gelu(convolve(F.gelu(project(x, expand)), depthwise))
    reduce, restore = (part.weight for part in excitation.gate if isinstance(part, nn.Linear))
    gate = F.linear(F.silu(F.linear(y.mean((2, 3)), reduce)), restore).sigmoid()
    return x + project(y * gate[..., None, None], last)


def _window_attention(layer: Any, size: int) -> dict[str, Any]:
    return dict(**_attention(layer), bias=_positions(layer.fn), window_size=size)


def _grid_attention(layer: Any, size: int) -> dict[str, Any]:
    return dict(**_attention(layer), bias_table=_positions(layer.fn), grid_size=size)


def _positions(attention: Any) -> Tensor | None:
    return attention.rel_pos_bias.weight if attention.with_pe else None


def _attention(layer: Any) -> dict[str, Any]:
    """Arguments of an operator for x + attention(norm(x)) in windows or grids."""
    norm, attention = layer.norm, layer.fn
    return {
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "qkv_weight": pointwise(attention.to_qkv),
        "qkv_bias": attention.to_qkv.bias,
        "project_weight": pointwise(attention.to_out[0]),
        "project_bias": attention.to_out[0].bias,
        "num_heads": attention.heads,
        "eps": norm.eps,
    }


def _inactive(block: Any) -> str | None:
    layers = block.layer
    attentions = [layers[2].fn, layers[8].fn]
    drop = layers[0].dropsample
    if drop.training and drop.prob > 0:
        return "Dropsample is active in training"
    return drops(*(attention.attend[1] for attention in attentions), *(attention.to_out[1] for attention in attentions))


RULES = (Rule("OmniSR block", ("OSA_Block",), reason(_check), parts_below, _forward, _inactive),)
