"""Attention of GRL (Li et al., CVPR 2023): cosine attention in windows, and in stripes by way of anchors."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, reason
from .swin import dense_bias
from .swin2sr import LARGEST_LOGIT_SCALE

Piece = tuple[slice, int, slice]


def _check(attention: Any) -> None:
    windows, stripes = attention.window_attn, attention.stripe_attn
    expect_type(attention, "proj", nn.Linear)
    expect(isinstance(attention.qkv, nn.Module) and isinstance(attention.anchor, nn.Module), "it lacks projections")
    for half, transforms in (
        (windows, (windows.attn_transform,)),
        (stripes, (stripes.attn_transform1, stripes.attn_transform2)),
    ):
        expect(not half.euclidean_dist, "it attends by distances")
        for transform in transforms:
            expect(transform.logit_scale.numel() == half.num_heads, "its logit_scale is not one of each head")
            expect(isinstance(transform.cpb_mlp, nn.Module), "it lacks a network of relative positions")
    expect(list(stripes.stripe_groups) == [None, None], "the size of its stripes is that of the image")
    factor = stripes.anchor_window_down_factor
    expect(
        all(size % factor == 0 for pair in _stripes(stripes) for size in pair), f"anchors of {factor} cut its stripes"
    )
    expect(all(0 <= windows.shift_size < size for size in windows.window_size), "its windows are shifted beyond one")


def _stripes(attention: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a stripe, and of their shift."""
    rows, columns = attention.stripe_size
    return (rows, columns), (rows // 2, columns // 2) if attention.stripe_shift else (0, 0)


def _forward(attention: Any, x: Tensor, x_size: tuple[int, int], table_index_mask: dict[str, Tensor]) -> Tensor:
    """Half of the channels in windows, half in stripes, whose pixels see each other by way of anchors."""
    windows, stripes = attention.window_attn, attention.stripe_attn
    q, k, v, *of_stripes = as_map(attention.qkv(x, x_size), *x_size).chunk(6, dim=1)
    near = ops.window_attention(
        q,
        k,
        v,
        _table(windows.attn_transform, table_index_mask["table_w"]),
        _temperature(windows.attn_transform),
        num_heads=windows.num_heads,
        window_size=windows.window_size,
        shift=windows.shift_size,
    )
    anchors = attention.anchor(x, x_size).movedim(-1, 1)
    q, k, v = of_stripes
    table, (stripe, shift) = table_index_mask["table_s"], _stripes(stripes)
    bias = dense_bias(_table(stripes.attn_transform1, table), table_index_mask["index_a2w"])
    gathered = _gather(anchors, k, v, bias, _temperature(stripes.attn_transform1), stripe, shift)
    far = ops.window_attention(
        q,
        anchors,
        gathered,
        _table(stripes.attn_transform2, table),
        _temperature(stripes.attn_transform2),
        num_heads=stripes.num_heads,
        window_size=stripe,
        shift=shift,
    )
    return F.linear(as_tokens(torch.cat((near, far), dim=1)), attention.proj.weight, attention.proj.bias)


def _temperature(transform: Any) -> Tensor:
    return transform.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()


def _table(transform: Any, coordinates: Tensor) -> Tensor:
    """(rows, heads); the model makes coordinates in float32 at another size than that of its training."""
    coordinates = coordinates.to(transform.logit_scale.dtype)
    return 16 * torch.sigmoid(transform.cpb_mlp(coordinates).flatten(0, -2))


def _gather(
    anchors: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    temperature: Tensor,
    stripe: tuple[int, int],
    shift: tuple[int, int],
) -> Tensor:
    """What anchors (B, C, h, w) gather from the pixels of their stripes, of maps (B, C, H, W): PyTorch's attention.

    The operators take no smaller map of queries than of keys. Stripes begin at ``shift``; those that the border cuts
    are computed by themselves, without a mask.
    """
    factor, heads = k.shape[2] // anchors.shape[2], len(bias)
    of_anchors = [size // factor for size in stripe]
    bias = bias.unflatten(2, stripe).unflatten(1, of_anchors)
    rows, columns = (
        list(zip(_pieces(size // factor, length // factor, start // factor), _pieces(size, length, start), strict=True))
        for size, length, start in zip(k.shape[2:], stripe, shift, strict=True)
    )
    lines = []
    for few_rows, many_rows in rows:
        line = []
        for few_columns, many_columns in columns:
            queries = F.normalize(_windows(anchors, few_rows, few_columns, heads), dim=-1) * temperature
            keys = F.normalize(_windows(k, many_rows, many_columns, heads), dim=-1)
            values = _windows(v, many_rows, many_columns, heads)
            inside = bias[:, few_rows[2], few_columns[2], many_rows[2], many_columns[2]].flatten(3).flatten(1, 2)
            out = F.scaled_dot_product_attention(queries, keys, values, inside[None].to(queries.dtype), scale=1.0)
            line.append(_map(out, len(k), few_rows, few_columns))
        lines.append(torch.cat(line, dim=3))
    return torch.cat(lines, dim=2)


def _pieces(size: int, window: int, shift: int) -> Iterable[Piece]:
    """(pixels, number of windows, the pixels of a window that they are) of what windows make of an axis."""
    end = size - (size - shift) % window
    pieces = (
        (slice(0, shift), 1, slice(window - shift, window)),
        (slice(shift, end), (end - shift) // window, slice(0, window)),
        (slice(end, size), 1, slice(0, size - end)),
    )
    return [piece for piece in pieces if piece[0].start < piece[0].stop]


def _windows(x: Tensor, rows: Piece, columns: Piece, heads: int) -> Tensor:
    """(B, C, H, W) -> (windows, heads, tokens, C/heads) of one piece."""
    x = x[:, :, rows[0], columns[0]].unflatten(3, (columns[1], -1)).unflatten(2, (rows[1], -1))
    return x.unflatten(1, (heads, -1)).permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)


def _map(windows: Tensor, batch: int, rows: Piece, columns: Piece) -> Tensor:
    """The inverse of :func:`_windows`."""
    sizes = rows[2].stop - rows[2].start, columns[2].stop - columns[2].start
    x = windows.unflatten(2, sizes).unflatten(0, (batch, rows[1], columns[1]))
    return x.permute(0, 3, 6, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _parts(attention: Any) -> list[nn.Module]:
    """All but the projections to q, k, v and anchors and the networks of relative positions, which are called."""
    windows, stripes = attention.window_attn, attention.stripe_attn
    transforms = [windows.attn_transform, stripes.attn_transform1, stripes.attn_transform2]
    halves = [part for half in (windows, stripes) for part in (half, half.softmax, half.attn_drop)]
    return [attention.proj, attention.proj_drop, *transforms, *halves]


RULES = (
    Rule(
        "GRL attention", ("MixedAttention",), reason(_check), _parts, _forward,
        lambda attention: drops(
            attention.proj_drop, attention.window_attn.attn_drop, attention.stripe_attn.attn_drop
        ),
        arguments=("x", "x_size", "table_index_mask"),
    ),
)  # fmt: skip
