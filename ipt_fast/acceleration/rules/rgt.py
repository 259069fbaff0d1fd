"""Blocks of RGT (Chen et al., 2024): rectangular windows in two halves of the heads, and a gated network as of DAT."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, inside, pointwise, reason
from .srformer import check_depthwise
from .swin import check_norm, project

# -- windows ----------------------------------------------------------------------------------------------------


def _check_windows(attention: Any) -> None:
    expect_type(attention, "qkv", nn.Linear)
    expect_type(attention, "proj", nn.Linear)
    check_depthwise(attention.get_v, attention.qkv.in_features, (3,))
    expect(len(attention.attns) == 2 and hasattr(attention, "attn_mask_0"), "it has no two halves")
    for half, sizes in zip(attention.attns, _windows(attention), strict=True):
        expect((half.H_sp, half.W_sp) == sizes, "its windows are of other sizes")
        positions = (2 * half.H_sp - 1) * (2 * half.W_sp - 1)
        expect(half.position_bias and half.rpe_biases.shape[0] == positions, "its relative positions are others")


def _windows(attention: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, columns = attention.split_size
    return (rows, columns), (columns, rows)


def _attend(attention: Any, x: Tensor, H: int, W: int) -> Tensor:
    """Windows of the first half are (rows, columns), of the second (columns, rows), and so are their shifts."""
    qkv = project(x, attention.qkv, (H, W))
    convolved = attention.get_v(qkv.chunk(3, dim=1)[2])
    # Pixels beyond the border have q, k and v of zeros and take part.
    multiple = max(attention.split_size)
    if H % multiple or W % multiple:
        qkv = F.pad(qkv, (0, -W % multiple, 0, -H % multiple))
    rows, columns = attention.shift_size if attention.attn_mask_0 is not None else (0, 0)
    halves = []
    for number, (half, shift) in enumerate(zip(attention.attns, ((rows, columns), (columns, rows)), strict=True)):
        q, k, v = (t.chunk(2, dim=1)[number] for t in qkv.chunk(3, dim=1))
        attended = ops.window_attention(
            q,
            k,
            v,
            half.pos(half.rpe_biases),
            num_heads=half.num_heads,
            window_size=(half.H_sp, half.W_sp),
            shift=shift,
            scale=half.scale,
        )
        halves.append(attended[..., :H, :W])
    return F.linear(as_tokens(torch.cat(halves, dim=1) + convolved), attention.proj.weight, attention.proj.bias)


def _parts_of_windows(attention: Any) -> list[nn.Module]:
    """All but the convolution and the networks of relative positions, which are called."""
    halves = [part for half in attention.attns for part in (half, half.attn_drop)]
    return [attention.qkv, attention.proj, attention.proj_drop, *halves]


def _windows_inactive(attention: Any) -> str | None:
    return drops(attention.proj_drop, *(half.attn_drop for half in attention.attns))


# -- the block --------------------------------------------------------------------------------------------------


def _check(block: Any) -> None:
    network = block.mlp
    check_norm(block, "norm2")
    check_norm(network.sg, "norm")
    for name in ("fc1", "fc2"):
        expect_type(network, name, nn.Linear)
    expect_type(network, "act", nn.GELU)
    expect(network.act.approximate == "none", "its GELU is an approximation")
    check_depthwise(network.sg.conv, network.fc2.in_features, (3,))
    expect(block.gamma.dim() == 1, "its gamma is not of each channel")
    expect(isinstance(block.attn, nn.Module) and isinstance(block.norm1, nn.Module), "it lacks an attention")


def _forward(block: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    y = x + block.drop_path(block.attn(block.norm1(x), *x_size))
    network, gate, norm = block.mlp, block.mlp.sg, block.norm2
    out = ops.feed_forward_layer(
        as_map(y, *x_size),
        norm.weight,
        norm.bias,
        pointwise(network.fc1),
        gate.conv.weight,
        pointwise(network.fc2),
        form="sgfn",
        expand_bias=network.fc1.bias,
        depthwise_bias=gate.conv.bias,
        project_bias=network.fc2.bias,
        inner_weight=gate.norm.weight,
        inner_bias=gate.norm.bias,
        eps=norm.eps,
        inner_eps=gate.norm.eps,
    )
    return torch.addcmul(as_tokens(out).to(x.dtype), x, block.gamma)


RULES = (
    Rule(
        "RGT block", ("Block",), reason(_check), lambda block: [block.norm2, block.mlp, *inside(block.mlp)], _forward,
        lambda block: drops(block.drop_path, block.mlp.drop), arguments=("x", "x_size"),
    ),
    Rule(
        "RGT windows", ("L_SA",), reason(_check_windows), _parts_of_windows, _attend, _windows_inactive,
        arguments=("x", "H", "W"),
    ),
)  # fmt: skip
