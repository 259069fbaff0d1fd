"""Cross-covariance attention of tokens (XCiT, El-Nouby et al., NeurIPS 2021), as timm has it, and of maps (DITN)."""

from typing import Any

from torch import Tensor, nn

from ... import ops
from ._layers import expect_pointwise, parts_below, project
from ._rule import Rule, as_map, as_tokens, drops, expect, expect_type, reason


def _check(attention: Any) -> None:
    expect_type(attention, "qkv", nn.Linear)
    expect_type(attention, "proj", nn.Linear)
    heads = attention.temperature.numel()
    expect(heads == attention.num_heads, f"it has {heads} temperatures")


def _forward(attention: Any, x: Tensor) -> Tensor:
    y = _attend(as_map(x, x.shape[1], 1), attention, attention.num_heads)
    return as_tokens(project(y, attention.proj))


def _attend(x: Tensor, attention: Any, heads: int) -> Tensor:
    q, k, v = project(x, attention.qkv).chunk(3, dim=1)
    return ops.channel_attention(q, k, v, attention.temperature, num_heads=heads)


def _inactive(attention: Any) -> str | None:
    return drops(attention.attn_drop, attention.proj_drop)


# -- DITN (Liu et al., ACM MM 2023), whose maps are windows of the image ----------------------------------------


def _check_windows(attention: Any) -> None:
    expect_type(attention, "qkv", nn.Linear)
    expect_pointwise(project_out=attention.project_out)
    expect(attention.temperature.numel() == 1, "it has several temperatures")


def _forward_windows(attention: Any, x: Tensor) -> Tensor:
    return project(_attend(x, attention, 1), attention.project_out)


RULES = (
    Rule("XCiT attention", ("XCA",), reason(_check), parts_below, _forward, _inactive, arguments=("x",)),
    Rule("DITN attention", ("ISA",), reason(_check_windows), parts_below, _forward_windows, arguments=("x",)),
)
