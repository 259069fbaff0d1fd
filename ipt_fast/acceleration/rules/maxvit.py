"""Attention of MaxViT (Tu et al., ECCV 2022), in blocks and grids, as timm has it with the channels last."""

from typing import Any

from torch import Tensor, nn

from ... import ops
from ._rule import Rule, drops, expect, expect_type, inside, pointwise, reason
from .swin import feed_forward, kept


def _check(block: Any) -> None:
    """Of the attention and of the network."""
    _check_attention(block)
    _check_branch(block, "norm2", "ls2")
    network = block.mlp
    expect_type(network, "fc1", nn.Linear)
    expect_type(network, "fc2", nn.Linear)
    expect(isinstance(getattr(network, "norm", None), nn.Identity | None), "its network has a norm")
    kind = type(network.act).__name__
    expect(kind == "GELU" and getattr(network.act, "approximate", "none") == "none", "its act is no exact GELU")


def _check_attention(block: Any) -> None:
    attention, size = block.attn, tuple(block.partition_size)
    _check_branch(block, "norm1", "ls1")
    expect_type(attention, "qkv", nn.Linear)
    expect_type(attention, "proj", nn.Linear)
    channels = attention.num_heads * attention.dim_head
    expect(attention.qkv.weight.shape == (3 * channels, channels), "its q, k and v have other widths than it")
    expect(attention.scale == attention.dim_head**-0.5, "its scale is another")
    expect(block.partition_block or size[0] == size[1], "its grid has two sizes")
    positions = attention.rel_pos
    if positions is not None:
        kind = type(positions).__name__
        expect(kind in ("RelPosBias", "RelPosBiasTf", "RelPosMlp"), f"its relative positions are a {kind}")
        expect(tuple(positions.window_size) == size, "its relative positions are others")
        expect(getattr(positions, "prefix_tokens", 0) == 0, "its relative positions have a class token")


def _check_branch(block: Any, norm: str, scale: str) -> None:
    """timm's layer norms are those of PyTorch, or compute the same by a class of their own."""
    found = getattr(block, norm)
    expect(isinstance(found, nn.LayerNorm) and type(found).__name__ == "LayerNorm", f"its {norm} is no layer norm")
    expect(found.bias is not None and len(found.normalized_shape) == 1, f"its {norm} has no bias or several axes")
    kind = type(getattr(block, scale)).__name__
    expect(kind in ("Identity", "LayerScale"), f"its {scale} is a {kind}")


def _forward(block: Any, x: Tensor) -> Tensor:
    y = _attend(block, x.movedim(-1, 1))
    return feed_forward(y, block.norm2, block.mlp, _gate(y, block.ls2, block.drop_path2)).movedim(1, -1).to(x.dtype)


def _forward_attention(block: Any, x: Tensor) -> Tensor:
    """The network is called as it is."""
    y = _attend(block, x.movedim(-1, 1)).movedim(1, -1)
    return (y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))).to(x.dtype)


def _attend(block: Any, x: Tensor) -> Tensor:
    """x + gate * attention(norm(x)) of a map (B, C, H, W), in blocks or in grids over all of it."""
    attention, norm = block.attn, block.norm1
    bias = attention.qkv.bias
    arguments = dict(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        qkv_weight=_by_kind(pointwise(attention.qkv), attention),
        project_weight=pointwise(attention.proj),
        qkv_bias=None if bias is None else _by_kind(bias, attention),
        project_bias=attention.proj.bias,
        gate=_gate(x, block.ls1, block.drop_path1),
        num_heads=attention.num_heads,
        eps=norm.eps,
    )
    table = _table(attention.rel_pos)
    if block.partition_block:
        return ops.window_attention_layer(x, bias=table, window_size=block.partition_size, **arguments)
    return ops.grid_attention_layer(x, bias_table=table, grid_size=block.partition_size[0], **arguments)


def _by_kind(rows: Tensor, attention: Any) -> Tensor:
    """Rows of q, k and v one after the other, where some models have them head by head."""
    if not attention.head_first:
        return rows
    return rows.unflatten(0, (attention.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _table(positions: Any) -> Tensor | None:
    """(rows, heads); that of TensorFlow's models holds the offset from query to key, and heads come first."""
    kind = type(positions).__name__
    if kind == "RelPosBias":
        return positions.relative_position_bias_table
    if kind == "RelPosBiasTf":
        return positions.relative_position_bias_table.flip(1, 2).flatten(1).T
    if kind == "RelPosMlp":
        table = positions.bias_act(positions.mlp(positions.rel_coords_log)).flatten(0, 1)
        return table if positions.bias_gain is None else positions.bias_gain * table
    return None


def _gate(x: Tensor, scale: Any, drop_path: nn.Module) -> Tensor | None:
    """What a branch is multiplied by: its layer scale, and stochastic depth."""
    factors = [factor for factor in (getattr(scale, "gamma", None), kept(x, drop_path)) if factor is not None]
    return factors[0] * factors[1] if len(factors) == 2 else factors[0] if factors else None


def _parts_of_attention(block: Any) -> list[nn.Module]:
    """All but a network of relative positions, which is called."""
    attention = block.attn
    read = [attention.qkv, attention.attn_drop, attention.proj, attention.proj_drop, attention.rel_pos]
    return [block.norm1, block.ls1, block.drop_path1, attention, *(part for part in read if part is not None)]


def _parts(block: Any) -> list[nn.Module]:
    network = [block.norm2, block.ls2, block.drop_path2, block.mlp, *inside(block.mlp)]
    return [*_parts_of_attention(block), *network]


def _attention_inactive(block: Any) -> str | None:
    return drops(block.attn.attn_drop, block.attn.proj_drop)


def _inactive(block: Any) -> str | None:
    return _attention_inactive(block) or drops(block.mlp.drop1, block.mlp.drop2)


RULES = (
    Rule("MaxViT block", ("PartitionAttentionCl",), reason(_check), _parts, _forward, _inactive, arguments=("x",)),
    # Those with another activation, as the tanh approximation of GELU.
    Rule(
        "MaxViT attention", ("PartitionAttentionCl",), reason(_check_attention), _parts_of_attention,
        _forward_attention, _attention_inactive, arguments=("x",),
    ),
)  # fmt: skip
