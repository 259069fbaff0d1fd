"""Blocks of Uformer (Wang et al., 2022): windows with modulators, and LeFF."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, inside, pointwise, reason
from .srformer import check_depthwise
from .swin import check_mlp, check_norm, check_table, feed_forward


def _check(block: Any) -> None:
    check_norm(block, "norm1")
    check_norm(block, "norm2")
    attention = block.attn
    expect(tuple(attention.win_size) == (block.win_size,) * 2, "its windows are of two sizes")
    for name in ("to_q", "to_kv"):
        expect_type(attention.qkv, name, nn.Linear)
    expect((attention.qkv.to_q.bias is None) == (attention.qkv.to_kv.bias is None), "one of its biases lacks")
    expect_type(attention, "proj", nn.Linear)
    check_table(attention, attention.win_size)
    if block.modulator is not None:
        expect_type(block, "modulator", nn.Embedding)
        expect(block.modulator.num_embeddings == block.win_size**2, "its modulator is of another window")
        expect(block.modulator.max_norm is None, "its modulator is normalised")
    if block.cross_modulator is not None:
        expect_type(block, "cross_modulator", nn.Embedding)
    if hasattr(block.mlp, "fc1"):
        check_mlp(block.mlp)
    else:
        _check_leff(block.mlp)


def _check_leff(network: Any) -> None:
    expand, first = network.linear1
    depthwise, second = network.dwconv
    (project,) = network.linear2
    types = tuple(map(type, (expand, first, depthwise, second, project, network.eca)))
    expected = (nn.Linear, nn.GELU, nn.Conv2d, nn.GELU, nn.Linear, nn.Identity)
    expect(types == expected, "its LeFF is made of other layers")
    expect(first.approximate == second.approximate == "none", "its GELU is an approximation")
    check_depthwise(depthwise, expand.out_features, (3,))


def _forward(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return block.plain_class.forward(block, x, mask)
    size = math.isqrt(x.shape[1])
    if block.cross_modulator is not None:
        x = x + block.cross_attn(x, block.cross_modulator.weight)
    y = _attend(block, x, size)
    out = feed_forward(y, block.norm2, block.mlp) if hasattr(block.mlp, "fc1") else _leff(y, block.norm2, block.mlp)
    return as_tokens(out).to(x.dtype)


def _attend(block: Any, x: Tensor, size: int) -> Tensor:
    """x + attention(norm(x) + modulator), a map; the modulator is of each pixel of a window."""
    attention, norm = block.attn, block.norm1
    queries, keys = attention.qkv.to_q, attention.qkv.to_kv
    weight = torch.cat((queries.weight, keys.weight))
    bias = None if queries.bias is None else torch.cat((queries.bias, keys.bias))
    windows = {"num_heads": attention.num_heads, "window_size": block.win_size, "shift": block.shift_size}
    table, scale = attention.relative_position_bias_table, attention.scale
    if block.modulator is None:
        return ops.window_attention_layer(
            as_map(x, size, size),
            norm.weight,
            norm.bias,
            weight[..., None, None],
            pointwise(attention.proj),
            table,
            qkv_bias=bias,
            project_bias=attention.proj.bias,
            scale=scale,
            eps=norm.eps,
            **windows,
        )
    normed = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    inside_window = (torch.arange(size, device=x.device) - block.shift_size) % block.win_size
    index = inside_window[:, None] * block.win_size + inside_window
    modulated = normed + block.modulator.weight[index.flatten()]
    q, k, v = as_map(F.linear(modulated, weight, bias), size, size).chunk(3, dim=1)
    attended = as_tokens(ops.window_attention(q, k, v, table, scale=scale, **windows))
    return as_map(x + F.linear(attended, attention.proj.weight, attention.proj.bias), size, size)


def _leff(x: Tensor, norm: Any, network: Any) -> Tensor:
    expand, depthwise, project = network.linear1[0], network.dwconv[0], network.linear2[0]
    return ops.feed_forward_layer(
        x,
        norm.weight,
        norm.bias,
        pointwise(expand),
        depthwise.weight,
        pointwise(project),
        form="leff",
        expand_bias=expand.bias,
        depthwise_bias=depthwise.bias,
        project_bias=project.bias,
        eps=norm.eps,
    )


def _parts(block: Any) -> list[nn.Module]:
    """All but what is in the cross-attention, which is called."""
    called = set() if block.cross_modulator is None else set(block.cross_attn.modules())
    return [part for part in inside(block) if part not in called]


def _inactive(block: Any) -> str | None:
    dropouts = (module for module in (*block.attn.modules(), *block.mlp.modules()) if isinstance(module, nn.Dropout))
    return drops(block.drop_path, *dropouts)


RULES = (
    Rule(
        "Uformer block", ("LeWinTransformerBlock",), reason(_check), _parts, _forward, _inactive,
        arguments=("x", "mask"),
    ),
)  # fmt: skip
