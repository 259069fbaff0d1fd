"""Blocks of the dual aggregation transformer (DAT, Chen et al., ICCV 2023)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._layers import (
    convolve_normalise_and_activate,
    expect_depthwise,
    expect_pointwise,
    expect_sequence,
    folded,
    mean_of_pixels,
    normalise_and_project,
    parts_below,
    project,
)
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, pointwise, reason
from ._weights import of_weights, run_layer
from .swin import check_mlp, check_norm


def _check(block: Any) -> None:
    check_norm(block, "norm1")
    check_norm(block, "norm2")
    check_mlp(block.ffn)
    check_norm(block.ffn.sg, "norm")
    expect_depthwise(3, convolution=block.ffn.sg.conv)
    attention = block.attn
    expect_type(attention, "qkv", nn.Linear)
    expect_type(attention, "proj", nn.Linear)
    _check_interaction(attention)
    if hasattr(attention, "attns"):
        _check_windows(attention)
    else:
        heads = attention.num_heads
        expect(attention.temperature.numel() == heads, f"it has {attention.temperature.numel()} temperatures")


def _check_interaction(attention: Any) -> None:
    """The depthwise branch, and by what channels and pixels are gated."""
    spatial, channel = attention.spatial_interaction, attention.channel_interaction
    expect_sequence("dwconv", attention.dwconv, nn.Conv2d, nn.BatchNorm2d, nn.GELU)
    expect_sequence("spatial_interaction", spatial, nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.Conv2d)
    pooled = nn.AdaptiveAvgPool2d, nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.Conv2d
    expect_sequence("channel_interaction", channel, *pooled)
    expect_depthwise(3, dwconv=attention.dwconv[0])
    for sequence, places in ((spatial, (0, 3)), (channel, (1, 4))):
        for place in places:
            expect_pointwise(interaction=sequence[place])


def _check_windows(attention: Any) -> None:
    """Two halves of the channels, each with rectangular windows and a small network for its relative positions."""
    expect(len(attention.attns) == 2, f"it has {len(attention.attns)} parts")
    for part, order in zip(attention.attns, (1, -1), strict=True):
        expect((part.H_sp, part.W_sp) == tuple(attention.split_size)[::order], "its windows are of other sizes")
        positions = (2 * part.H_sp - 1) * (2 * part.W_sp - 1)
        expect(part.position_bias and part.rpe_biases.shape[0] == positions, "its relative positions are others")
    expect(attention.num_heads == 2 * attention.attns[0].num_heads, "its parts have other heads")


def _forward(block: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    attention = block.attn
    tokens = x
    x = as_map(tokens, *x_size)
    qkv = normalise_and_project(x, block.norm1, attention.qkv)
    q, k, v = qkv.chunk(3, dim=1)
    convolved = convolve_normalise_and_activate(v, attention.dwconv[0], attention.dwconv[1])
    if hasattr(attention, "attns"):
        x = _interact(attention, _attend_in_windows(attention, qkv), convolved, x)
    else:
        attended = ops.channel_attention(q, k, v, attention.temperature, num_heads=attention.num_heads)
        x = _interact(attention, convolved, attended, x)
    return as_tokens(run_layer(ops.feed_forward_layer, x, _feed_forward, block.ffn, block.norm2)).to(tokens.dtype)


def _feed_forward(network: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    return dict(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        expand_weight=pointwise(network.fc1),
        depthwise_weight=network.sg.conv.weight,
        project_weight=pointwise(network.fc2),
        form="sgfn",
        expand_bias=network.fc1.bias,
        depthwise_bias=network.sg.conv.bias,
        project_bias=network.fc2.bias,
        inner_weight=network.sg.norm.weight,
        inner_bias=network.sg.norm.bias,
        eps=norm.eps,
        inner_eps=network.sg.norm.eps,
    )


def _attend_in_windows(attention: Any, qkv: Tensor) -> Tensor:
    """Attention of the two halves of the channels; of some blocks the windows are shifted by half of their size."""
    height, width = qkv.shape[2:]
    multiple = max(attention.split_size)
    # Pixels beyond the border have q, k and v of zeros and take part.
    below, right = -height % multiple, -width % multiple
    if below or right:
        qkv = F.pad(qkv, (0, right, 0, below))
    shifted = attention.attn_mask_0 is not None
    parts, halves = qkv.chunk(6, dim=1), []
    for first, part in enumerate(attention.attns):
        q, k, v = parts[first::2]
        shift = tuple(attention.shift_size)[:: -1 if first else 1] if shifted else 0
        out = ops.window_attention(
            q,
            k,
            v,
            _positions(part),
            num_heads=part.num_heads,
            window_size=(part.H_sp, part.W_sp),
            shift=shift,
            scale=part.scale,
        )
        halves.append(out[..., :height, :width])
    return torch.cat(halves, dim=1)


@of_weights
def _positions(part: Any) -> Tensor:
    """The table of relative positions."""
    return part.pos(part.rpe_biases)


def _interact(attention: Any, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """x + the projection of ``first``, its channels gated by ``second``, plus ``second``, its pixels by ``first``."""
    channels = _gate_of_channels(second, *attention.channel_interaction)
    pixels = _gate_of_pixels(first, *attention.spatial_interaction)
    proj = attention.proj
    return ops.gated_projection(first, second, channels, pixels, pointwise(proj), proj.bias, x)


def _gate_of_channels(
    x: Tensor, pool: nn.Module, reduce: nn.Conv2d, norm: nn.BatchNorm2d, activation: nn.GELU, last: nn.Conv2d
) -> Tensor:
    """(B, C, H, W) -> (B, C)."""
    if norm.training:
        hidden = convolve_normalise_and_activate(mean_of_pixels(x), reduce, norm).flatten(1)
    else:
        weight, bias = folded(reduce, norm)
        hidden = F.gelu(F.linear(x.mean((2, 3)), weight.flatten(1), bias))
    return F.linear(hidden, last.weight.flatten(1), last.bias).sigmoid()


def _gate_of_pixels(x: Tensor, reduce: nn.Conv2d, norm: nn.BatchNorm2d, activation: nn.GELU, last: nn.Conv2d) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W)."""
    return project(convolve_normalise_and_activate(x, reduce, norm), last).sigmoid()


def _inactive(block: Any) -> str | None:
    attention = block.attn
    parts = [part.attn_drop for part in getattr(attention, "attns", ())] or [attention.attn_drop]
    return drops(block.drop_path, *parts, attention.proj_drop, block.ffn.drop)


RULES = (Rule("DAT block", ("DATB",), reason(_check), parts_below, _forward, _inactive),)
