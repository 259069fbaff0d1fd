"""Blocks of HAT (Chen et al., 2023): windows beside convolutions with channel attention, and overlapping windows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._layers import normalise_and_project
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, inside, reason
from .swin import attend, check_mlp, check_norm, check_window_attention, dense_bias, feed_forward, kept


def _check_hybrid(block: Any) -> None:
    check_norm(block, "norm1")
    check_norm(block, "norm2")
    check_window_attention(block.attn)
    check_mlp(block.mlp)
    expect(tuple(block.attn.window_size) == (block.window_size,) * 2, "its windows are of two sizes")
    expect(isinstance(block.conv_scale, float | int), "its conv_scale is no number")
    expect(isinstance(block.conv_block, nn.Module), "it has no conv_block")


def _hybrid(block: Any, x: Tensor, x_size: tuple[int, int], rpi_sa: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Beside the attention, convolutions with channel attention of the same normalised map; windows need no mask."""
    image, norm = as_map(x, *x_size), block.norm1
    convolved = block.conv_block(ops.layer_norm_2d(image, norm.weight, norm.bias, eps=norm.eps))
    y = attend(image, norm, block.attn, block.shift_size, gate=kept(image, block.drop_path))
    y = torch.add(y, convolved, alpha=block.conv_scale)
    return as_tokens(feed_forward(y, block.norm2, block.mlp, kept(y, block.drop_path))).to(x.dtype)


def _parts_of_hybrid(block: Any) -> list[nn.Module]:
    """All but what is in the convolutional block, which is called."""
    read = (block.norm1, block.norm2, block.drop_path)
    return [*read, *block.attn.modules(), *block.mlp.modules()]


def _hybrid_inactive(block: Any) -> str | None:
    return drops(block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop)


def _check_overlapping(block: Any) -> None:
    check_norm(block, "norm1")
    check_norm(block, "norm2")
    expect_type(block, "qkv", nn.Linear)
    expect_type(block, "proj", nn.Linear)
    check_mlp(block.mlp)
    margin = block.overlap_win_size - block.window_size
    expect(margin > 0 and margin % 2 == 0, "its windows overlap by an odd number of pixels")


def _overlapping(block: Any, x: Tensor, x_size: tuple[int, int], rpi: Tensor) -> Tensor:
    """The bias is read by the model's own index, whose rows before the first are counted from the end of the table."""
    q, k, v = normalise_and_project(as_map(x, *x_size), block.norm1, block.qkv).chunk(3, dim=1)
    attended = ops.window_attention(
        q,
        k,
        v,
        dense_bias(block.relative_position_bias_table, rpi),
        num_heads=block.num_heads,
        window_size=block.window_size,
        key_size=block.overlap_win_size,
        scale=block.scale,
    )
    y = F.linear(as_tokens(attended), block.proj.weight, block.proj.bias) + x
    return as_tokens(feed_forward(as_map(y, *x_size), block.norm2, block.mlp)).to(x.dtype)


RULES = (
    Rule(
        "HAT hybrid block", ("HAB",), reason(_check_hybrid), _parts_of_hybrid, _hybrid, _hybrid_inactive,
        arguments=("x", "x_size", "rpi_sa", "attn_mask"),
    ),
    Rule(
        "HAT overlapping block", ("OCAB",), reason(_check_overlapping), inside, _overlapping,
        lambda block: drops(block.mlp.drop), arguments=("x", "x_size", "rpi"),
    ),
)  # fmt: skip
