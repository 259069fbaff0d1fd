"""Blocks of Swin transformers: SwinIR (Liang et al., 2021) and its kin."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.normalization import LayerNorm

from ... import ops
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, inside, pointwise, reason
from ._weights import run_layer


def check_norm(module: Any, name: str) -> None:
    """A layer norm over channels, with weight and bias."""
    expect_type(module, name, LayerNorm)
    norm = getattr(module, name)
    expect(len(norm.normalized_shape) == 1 and norm.bias is not None, f"its {name} has no bias or several axes")


def check_window_attention(attention: Any) -> None:
    """Swin's window attention: linear q, k and v, a table of relative positions, a linear projection."""
    expect_type(attention, "qkv", nn.Linear)
    expect_type(attention, "proj", nn.Linear)
    check_table(attention, attention.window_size)


def check_table(attention: Any, window: tuple[int, int]) -> None:
    """A table of relative positions in windows of this size, for each head."""
    shape = tuple(attention.relative_position_bias_table.shape)
    expect(
        shape == ((2 * window[0] - 1) * (2 * window[1] - 1), attention.num_heads),
        "its table of relative positions is of another size",
    )


def check_mlp(mlp: Any) -> None:
    """Linear, GELU, linear."""
    expect_type(mlp, "fc1", nn.Linear)
    expect_type(mlp, "fc2", nn.Linear)
    expect_type(mlp, "act", nn.GELU)
    expect(mlp.act.approximate == "none", "its GELU is an approximation")


def project(x: Tensor, linear: nn.Linear, size: tuple[int, int]) -> Tensor:
    """A linear layer of tokens (B, N, C) as a map (B, M, H, W), channels-last."""
    return as_map(F.linear(x, linear.weight, linear.bias), *size)


def dense_bias(table: Tensor, index: Tensor) -> Tensor:
    """(heads, Nq, Nk) of a table (rows, heads) and the index that a model has into it."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)


def kept(x: Tensor, drop_path: nn.Module) -> Tensor | None:
    """Stochastic depth of a branch as its gate (B, C), drawn by the module itself: 0, or 1 over the rate of keeping."""
    if not drops(drop_path):
        return None
    return drop_path(x.new_ones(len(x), 1, 1)).flatten(1).expand(-1, x.shape[1])


def attend(
    x: Tensor, norm: Any, attention: Any, shift: int, residual: bool = True, gate: Tensor | None = None
) -> Tensor:
    """x + gate * attention(norm(x)) in windows that begin at ``shift``, of a map (B, C, H, W)."""
    return run_layer(ops.window_attention_layer, x, _attention, attention, norm, shift, residual, gate=gate)


def _attention(attention: Any, norm: Any, shift: int, residual: bool) -> dict[str, Any]:
    return dict(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        qkv_weight=pointwise(attention.qkv),
        project_weight=pointwise(attention.proj),
        bias=attention.relative_position_bias_table,
        qkv_bias=attention.qkv.bias,
        project_bias=attention.proj.bias,
        num_heads=attention.num_heads,
        window_size=attention.window_size,
        shift=shift,
        scale=attention.scale,
        eps=norm.eps,
        residual=residual,
    )


def feed_forward(x: Tensor, norm: Any, mlp: Any, gate: Tensor | None = None) -> Tensor:
    """x + gate * mlp(norm(x)) of a map (B, C, H, W)."""
    return run_layer(ops.feed_forward_layer, x, _mlp, mlp, norm, gate=gate)


def _mlp(mlp: Any, norm: Any) -> dict[str, Any]:
    return dict(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        expand_weight=pointwise(mlp.fc1),
        depthwise_weight=None,
        project_weight=pointwise(mlp.fc2),
        form="mlp",
        expand_bias=mlp.fc1.bias,
        project_bias=mlp.fc2.bias,
        eps=norm.eps,
    )


# -- SwinIR and DRCT, which has its blocks in dense groups -------------------------------------------------------


def _check(block: Any) -> None:
    check_norm(block, "norm1")
    check_norm(block, "norm2")
    check_window_attention(block.attn)
    check_mlp(block.mlp)
    expect(tuple(block.attn.window_size) == (block.window_size,) * 2, "its windows are of two sizes")


def _forward(block: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    y = as_map(x, *x_size)
    y = attend(y, block.norm1, block.attn, block.shift_size, gate=kept(y, block.drop_path))
    return as_tokens(feed_forward(y, block.norm2, block.mlp, kept(y, block.drop_path))).to(x.dtype)


def _inactive(block: Any) -> str | None:
    return drops(block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop)


RULES = (
    Rule(
        "SwinIR block", ("SwinTransformerBlock",), reason(_check), inside, _forward, _inactive,
        arguments=("x", "x_size"),
    ),
)  # fmt: skip
