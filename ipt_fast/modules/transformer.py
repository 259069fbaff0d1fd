"""Layers of the IPT body: attention over tokens and feed-forward networks, pre-norm (IPT, eq. 1 and 2).

Norm and products are operators, whose backwards compute the norms again and keep hidden values once: a training step
keeps about half of what the formulas' own graph would.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.normalization import LayerNorm

from .. import ops
from ..ops import _select
from ..ops._operator import OPERATORS
from . import _fusion

_SQUARES = {side**2 for side in range(1, 17)}


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context for operations on ``x`` as they are written."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else contextlib.nullcontext()


def in_dtype_of(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the dtype of the first floating-point parameter in ``module``; as it is where there is none."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
    return x.to(dtype)


def _parameters(norm: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps) of what :func:`_fusion.token_norm` lets pass; of no norm (None, None, any eps)."""
    return (norm.weight, norm.bias, norm.eps) if isinstance(norm, LayerNorm) else (None, None, 1.0)


def norm_projection(
    x: Tensor, branch: Tensor | None, norm: nn.Module, weight: Tensor, offset: Tensor | None = None
) -> Any:
    """:func:`ipt_fast.ops.add_norm_projection` with a norm given as a module, which may be no norm.

    Where ``branch`` is None :func:`ipt_fast.ops.norm_projection`.
    """
    norm_weight, norm_bias, eps = _parameters(norm)
    if branch is None:
        return ops.norm_projection(x, norm_weight, norm_bias, weight, offset, eps=eps)
    return ops.add_norm_projection(x, branch, norm_weight, norm_bias, weight, offset, eps=eps)


def feed_forward(x: Tensor, branch: Tensor, norm: nn.Module, linear1: nn.Linear, linear2: nn.Linear) -> Tensor:
    """:func:`ipt_fast.ops.add_norm_feed_forward` of modules."""
    norm_weight, norm_bias, eps = _parameters(norm)
    products = linear1.weight, linear1.bias, linear2.weight, linear2.bias
    return ops.add_norm_feed_forward(x, branch, norm_weight, norm_bias, *products, eps=eps)


def grid_core_is_faster(qkv: Tensor, num_heads: int) -> bool:
    """Whether attention among the tokens of ``qkv`` (B, N, 3D) is the C++ core's for grids, all tokens one grid.

    As measured beside SDPA (`python -m benchmarks.ipt`): up to 16 x 16 tokens, but not in 16 bits without a backward.
    """
    if torch.compiler.is_compiling() or qkv.device.type != "cpu" or qkv.shape[1] not in _SQUARES or len(qkv) == 0:
        return False
    if _select.policy() not in ("auto", "cpu"):
        return False
    # A reason is no error, even where "cpu" is demanded: SDPA is as good.
    if _select.reason_against(OPERATORS["grid_attention"], "cpu", (qkv, None, num_heads, math.isqrt(qkv.shape[1]))):
        _select.warn_without_kernels("cpu")
        return False
    return qkv.dtype == torch.float32 or (torch.is_grad_enabled() and qkv.requires_grad)


def attend_as_a_grid(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V among all tokens of ``qkv`` (B, N, 3D), N a square: (B, N, D)."""
    side = math.isqrt(qkv.shape[1])
    tokens = qkv.transpose(1, 2).unflatten(2, (side, side))  # a view: channels-last
    return ops.grid_attention(tokens, num_heads=num_heads, grid_size=side).flatten(2).transpose(1, 2)


@_fusion.stock
class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V of heads of d channels, without biases; parameters named as nn.MultiheadAttention's.

    Shape: query (B, N, D), key and value (B, M, D) -> (B, N, D).

    Args:
        dim: channels D.
        num_heads: heads; divides D.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        nn.init.kaiming_uniform_(self.in_proj_weight, a=5**0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = self.in_proj_weight.chunk(3)
        return self._attend(*(F.linear(x, weight) for x, weight in zip((query, key, value), weights, strict=True)))

    def to_itself(self, x: Tensor, norm: nn.Module, added: Tensor | None = None) -> Tensor:
        """self(y + added, y + added, y) with y = LN(x), norm and projection as one: (B, N, D); added (N, D) or None."""
        rows = 2 * x.shape[2]
        offset = None if added is None else F.linear(added, self.in_proj_weight[:rows])
        qkv = norm_projection(x, None, norm, self.in_proj_weight, offset)
        if grid_core_is_faster(qkv, self.num_heads):
            return self.out_proj(attend_as_a_grid(qkv, self.num_heads))
        return self._attend(*qkv.chunk(3, dim=2))

    def to_memory(
        self,
        x: Tensor,
        branch: Tensor,
        norm: nn.Module,
        memory: Tensor,
        added: Tensor | None = None,
        added_to_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """t = x + branch and self(LN(t) + added, memory + added_to_keys, memory): (B, N, D); what is added (N, D)."""
        dim = x.shape[2]
        q_weight, k_weight, _ = self.in_proj_weight.chunk(3)
        offset = None if added is None else F.linear(added, q_weight)
        total, q = norm_projection(x, branch, norm, q_weight, offset)
        k, v = F.linear(memory, self.in_proj_weight[dim:]).chunk(2, dim=2)
        if added_to_keys is not None:
            k = k + F.linear(added_to_keys, k_weight)
        return total, self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # (B, N, D) -> (B, heads, N, d), as views
        q, k, v = (each.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _plus(x: Tensor, added: Tensor | None) -> Tensor:
    return x if added is None else x + added


class EncoderLayer(_fusion.Fusable):
    """z = x + MSA(y + p, y + p, y) with y = LN(x); z + FFN(LN(z)) (eq. 1; p only where positions are added every time).

    Shape: (B, N, D) -> (B, N, D); positions (N, D) or None.

    Args:
        dim, num_heads: D and heads.
        ratio: hidden channels of the FFN over D.
        norm: False leaves the norms out.
    """

    norm1: nn.Module
    norm2: nn.Module
    norms = 2

    def __init__(self, dim: int, num_heads: int, ratio: int = 4, norm: bool = True) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, ratio * dim)
        self.linear2 = nn.Linear(ratio * dim, dim)
        for i in range(self.norms):
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim) if norm else nn.Identity())

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return self._add_feed_forward(x, self._attend_to_itself(x, positions), self.norm2)

    def _attend_to_itself(self, x: Tensor, added: Tensor | None) -> Tensor:
        if self._against_attention(self.norm1, self.self_attn) is None:
            return self.self_attn.to_itself(x, self.norm1, added)
        y = self.norm1(x)
        return self.self_attn(_plus(y, added), _plus(y, added), y)

    def _add_feed_forward(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        if self._against_feed_forward(norm) is None:
            return feed_forward(x, branch, norm, self.linear1, self.linear2)
        x = x + branch
        return x + self.linear2(F.relu(self.linear1(norm(x))))

    def reasons_against_fusing(self) -> dict[str, str | None]:
        """{part: None if norm and products are fused, else why it runs module by module}."""
        return {
            "self_attn": self._against_attention(self.norm1, self.self_attn),
            "linear1": self._against_feed_forward(self.norm2),
        }

    def _against(self) -> str | None:
        return "it is a plain twin" if self.plain else _fusion.global_hooks()

    def _against_attention(self, norm: nn.Module, attention: nn.Module) -> str | None:
        if reason := self._against() or _fusion.first(
            norm=_fusion.token_norm(norm), attention=_fusion.changed(attention)
        ):
            return reason
        return None if isinstance(attention, MultiHeadAttention) else f"it is a {type(attention).__name__}"

    def _against_feed_forward(self, norm: nn.Module) -> str | None:
        return self._against() or _fusion.first(
            norm=_fusion.token_norm(norm), linear1=_fusion.linear(self.linear1), linear2=_fusion.linear(self.linear2)
        )


class DecoderLayer(EncoderLayer):
    """Self-attention, attention to the encoder's output, feed-forward (eq. 2).

    The task's embedding is added to q and k of the first attention and to q of the second, never to values. The memory
    enters as it is: the paper writes LN(z0), but the published weights were trained without that norm.

    Shape: (B, N, D), memory (B, N, D) -> (B, N, D); task and positions (N, D) or None. Arguments as
    :class:`EncoderLayer`.
    """

    norm3: nn.Module
    norms = 3

    def __init__(self, dim: int, num_heads: int, ratio: int = 4, norm: bool = True) -> None:
        super().__init__(dim, num_heads, ratio, norm)
        self.multihead_attn = MultiHeadAttention(dim, num_heads)

    def forward(  # type: ignore[override]  # takes the memory, too
        self, x: Tensor, memory: Tensor, task: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        branch = self._attend_to_itself(x, task)
        x, branch = self._attend_to_memory(x, branch, memory, task, positions)
        return self._add_feed_forward(x, branch, self.norm3)

    def _attend_to_memory(
        self, x: Tensor, branch: Tensor, memory: Tensor, task: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self._against_attention(self.norm2, self.multihead_attn) is None:
            return self.multihead_attn.to_memory(x, branch, self.norm2, memory, task, positions)
        x = x + branch
        return x, self.multihead_attn(_plus(self.norm2(x), task), _plus(memory, positions), memory)

    def reasons_against_fusing(self) -> dict[str, str | None]:
        return {
            "self_attn": self._against_attention(self.norm1, self.self_attn),
            "multihead_attn": self._against_attention(self.norm2, self.multihead_attn),
            "linear1": self._against_feed_forward(self.norm3),
        }
