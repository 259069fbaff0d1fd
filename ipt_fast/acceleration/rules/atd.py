"""Layers of ATD (Zhang et al., 2024): windows beside two attentions of other kinds, which are called as they are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._rule import Rule, as_map, as_tokens, expect, expect_type, reason
from .srformer import check_conv_ffn, conv_ffn
from .swin import check_norm, check_table


def _check(layer: Any) -> None:
    check_norm(layer, "norm1")
    check_norm(layer, "norm2")
    expect_type(layer, "wqkv", nn.Linear)
    expect_type(layer.attn_win, "proj", nn.Linear)
    expect(tuple(layer.attn_win.window_size) == (layer.window_size,) * 2, "its windows are of two sizes")
    check_table(layer.attn_win, layer.attn_win.window_size)
    check_conv_ffn(layer.convffn)
    expect(isinstance(layer.attn_atd, nn.Module) and isinstance(layer.attn_aca, nn.Module), "it lacks attentions")


def _forward(
    layer: Any, x: Tensor, td: Tensor, x_size: tuple[int, int], params: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    normed = layer.norm1(x)
    qkv = layer.wqkv(normed)
    of_dictionary, similarity = layer.attn_atd(normed, td, x_size)
    of_categories = layer.attn_aca(qkv, similarity, x_size)
    y = x + _attend(layer, qkv, x_size) + of_dictionary + of_categories
    y = as_tokens(conv_ffn(as_map(y, *x_size), layer.norm2, layer.convffn)).to(x.dtype)
    return y, td if layer.is_last else _refined(layer, td, y, similarity)


def _attend(layer: Any, qkv: Tensor, x_size: tuple[int, int]) -> Tensor:
    attention = layer.attn_win
    q, k, v = as_map(qkv, *x_size).chunk(3, dim=1)
    attended = ops.window_attention(
        q,
        k,
        v,
        attention.relative_position_bias_table,
        num_heads=attention.num_heads,
        window_size=layer.window_size,
        shift=layer.shift_size,
        scale=attention.scale,
    )
    return F.linear(as_tokens(attended), attention.proj.weight, attention.proj.bias)


def _refined(layer: Any, td: Tensor, x: Tensor, similarity: Tensor) -> Tensor:
    """The dictionary of tokens, moved towards those of the image that are like each (eq. 7 and 8)."""
    share = layer.softmax(layer.norm3(similarity.transpose(-1, -2)))
    kept = layer.sigmoid(layer.sigma)
    return kept * td + (1 - kept) * torch.bmm(share, x)


def _parts(layer: Any) -> list[nn.Module]:
    return [layer.norm2, *layer.attn_win.modules(), *layer.convffn.modules()]


RULES = (
    Rule(
        "ATD layer", ("ATDTransformerLayer",), reason(_check), _parts, _forward,
        arguments=("x", "td", "x_size", "params"),
    ),
)  # fmt: skip
