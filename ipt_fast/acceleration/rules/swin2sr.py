"""Blocks of Swin2SR (Conde et al., 2022), which are those of Swin V2: cosine attention, and norms behind branches."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, reason

LARGEST_LOGIT_SCALE = math.log(100.0)  # Swin V2, section 3.1: scores divided by 0.01 at least


def _check(block: Any) -> None:
    attention = block.attn
    expect_type(attention, "qkv", nn.Linear)
    expect_type(attention, "proj", nn.Linear)
    expect(attention.qkv.bias is None and hasattr(attention, "q_bias"), "its qkv has a bias of its own")
    expect(attention.logit_scale.numel() == attention.num_heads, "its logit_scale is not one of each head")
    rows, columns = attention.window_size
    expect((rows, columns) == (block.window_size,) * 2, "its windows are of two sizes")
    coordinates = attention.relative_coords_table
    expect(coordinates.numel() == 2 * (2 * rows - 1) * (2 * columns - 1), "its coordinates are of another size")
    expect(
        all(isinstance(m, nn.Module) for m in (block.norm1, block.norm2, block.mlp, attention.cpb_mlp)), "parts lack"
    )


def _forward(block: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    """Norms, the network behind the attention and that of the bias are called as they are."""
    y = x + block.drop_path(block.norm1(_attend(block.attn, x, x_size, block.window_size, block.shift_size)))
    return y + block.drop_path(block.norm2(block.mlp(y)))


def _attend(attention: Any, x: Tensor, x_size: tuple[int, int], window: int, shift: int) -> Tensor:
    bias = None
    if attention.q_bias is not None:
        bias = torch.cat((attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias))
    q, k, v = as_map(F.linear(x, attention.qkv.weight, bias), *x_size).chunk(3, dim=1)
    table = 16 * torch.sigmoid(attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads))
    temperature = attention.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()
    attended = ops.window_attention(
        q, k, v, table, temperature, num_heads=attention.num_heads, window_size=window, shift=shift
    )
    return F.linear(as_tokens(attended), attention.proj.weight, attention.proj.bias)


def _parts(block: Any) -> list[nn.Module]:
    attention = block.attn
    return [attention, attention.qkv, attention.proj, attention.softmax, attention.attn_drop, attention.proj_drop]


RULES = (
    Rule(
        "Swin2SR block", ("SwinTransformerBlock",), reason(_check), _parts, _forward,
        lambda block: drops(block.attn.attn_drop, block.attn.proj_drop), arguments=("x", "x_size"),
    ),
)  # fmt: skip
