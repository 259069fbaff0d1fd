"""Blocks of HAT (Chen et al., 2023): windows beside convolutions with channel attention, and overlapping windows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...ops._kernel import unwatched
from ...reference.window_attention import relative_position_index
from ._layers import (
    add_product,
    convolve,
    expect_dense,
    expect_gelu,
    expect_pointwise,
    expect_sequence,
    mean_of_pixels,
    normalise_and_project,
    project,
)
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, inside, reason
from ._weights import of_weights
from .swin import attend, check_mlp, check_norm, check_window_attention, dense_bias, feed_forward, kept


def _check_hybrid(block: Any) -> None:
    check_norm(block, "norm1")
    check_norm(block, "norm2")
    check_window_attention(block.attn)
    check_mlp(block.mlp)
    expect(tuple(block.attn.window_size) == (block.window_size,) * 2, "its windows are of two sizes")
    expect(isinstance(block.conv_scale, float | int), "its conv_scale is no number")
    expect(isinstance(block.conv_block, nn.Module), "it has no conv_block")


def _check_branch(branch: Any) -> None:
    """Two convolutions with a GELU between them, and channel attention."""
    types = [type(module).__name__ for module in branch.cab.children()]
    known = type(branch).__name__ == "CAB" and types == ["Conv2d", "GELU", "Conv2d", "ChannelAttention"]
    expect(known and type(branch.cab) is nn.Sequential, f"it is a {type(branch).__name__} of {', '.join(types)}")
    first, activation, second, attention = branch.cab
    expect_gelu("cab", activation)
    expect_dense(first=first, second=second)
    pooled = nn.AdaptiveAvgPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Sigmoid
    expect_sequence("attention", attention.attention, *pooled)
    expect_pointwise(reduction=attention.attention[1], restoration=attention.attention[3])


_misfit_of_branch = reason(_check_branch)


@of_weights
def _reads_branch(block: Any) -> bool:
    """Whether the convolutional block is of the known kind, and nothing in it is changed; else it is called."""
    return _misfit_of_branch(block.conv_block) is None


def _hybrid(block: Any, x: Tensor, x_size: tuple[int, int], rpi_sa: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Beside the attention, convolutions with channel attention of the same normalised map; windows need no mask."""
    image, norm = as_map(x, *x_size), block.norm1
    normal = ops.layer_norm_2d(image, norm.weight, norm.bias, eps=norm.eps)
    y = attend(image, norm, block.attn, block.shift_size, gate=kept(image, block.drop_path))
    if _reads_branch(block):
        convolved, gate = _convolved(block.conv_block, normal)
        y = add_product(y, convolved, gate, block.conv_scale)
    else:
        y = torch.add(y, block.conv_block(normal), alpha=block.conv_scale)
    return as_tokens(feed_forward(y, block.norm2, block.mlp, kept(y, block.drop_path))).to(x.dtype)


def _convolved(branch: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The map of the convolutions, and the gate of its channels."""
    first, _, second, attention = branch.cab
    y = convolve(convolve(x, first, "gelu"), second)
    _, reduce, _, restore, _ = attention.attention
    return y, project(F.relu(project(mean_of_pixels(y), reduce)), restore).sigmoid()


def _parts_of_hybrid(block: Any) -> list[nn.Module]:
    """All but what is in a convolutional block of another kind, which is called."""
    read = (block.norm1, block.norm2, block.drop_path, *(block.conv_block.modules() if _reads_branch(block) else ()))
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
    q, k, v = normalise_and_project(as_map(x, *x_size), block.norm1, block.qkv).chunk(3, dim=1)
    attended = ops.window_attention(
        q,
        k,
        v,
        _bias(block, rpi),
        num_heads=block.num_heads,
        window_size=block.window_size,
        key_size=block.overlap_win_size,
        scale=block.scale,
    )
    y = F.linear(as_tokens(attended), block.proj.weight, block.proj.bias) + x
    return as_tokens(feed_forward(as_map(y, *x_size), block.norm2, block.mlp)).to(x.dtype)


@of_weights
def _bias(block: Any, index: Tensor) -> Tensor:
    """The bias by the model's own index, whose rows before the first are counted from the end of the table.

    Of an index that depends on offsets alone it is a table of the operator, which reads that faster.
    """
    table, window, keys = block.relative_position_bias_table, block.window_size, block.overlap_win_size
    if index.is_cpu and unwatched():  # whoever traces calls cannot do so where they depend on values
        order = relative_position_index((window, window), (keys, keys))
        rows = index.new_zeros((window + keys - 1) ** 2)
        rows[order] = index
        if torch.equal(rows[order], index):
            return table[rows]
    return dense_bias(table, index)


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
