"""Layers of the IPT body: attention over tokens and feed-forward networks, pre-norm (IPT, eq. 1 and 2).

Norms are computed again in the backward, and hidden values live once: a training step keeps about half of what the
formulas' own graph would.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.normalization import LayerNorm

from ..ops._tokens import attend_as_a_grid, grid_core_is_faster, linear_relu, norm_backward, normalise
from . import _check, _fusion


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class _NormProjection(torch.autograd.Function):
    """t = x + branch and LN(t) W^T, to the first channels of which an offset for each token is added; keeps t alone.

    Without a branch LN(x) W^T only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        offset: Tensor | None,
        eps: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        total, y, mean, scale = normalise(x, branch, norm_weight, norm_bias, eps, weight.dtype)
        out = F.linear(y, weight)
        if offset is not None:
            out[..., : offset.shape[-1]] += offset
        ctx.save_for_backward(total, mean, scale, norm_weight, norm_bias, weight)
        ctx.eps, ctx.offset = eps, offset if offset is None else (offset.shape[-1], offset.dtype)
        ctx.branch = None if branch is None else branch.dtype
        return out if branch is None else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, scale, norm_weight, norm_bias, weight = ctx.saved_tensors
        residual, grad = (None, grads[0]) if ctx.branch is None else grads
        with without_autocast(total):
            _, y, _, _ = normalise(total, None, norm_weight, norm_bias, ctx.eps, weight.dtype)
            weight_grad = _weight_gradient(grad, y)
            del y
            norm = norm_weight, norm_bias, ctx.eps
            of_total, *norm_grads = norm_backward(grad @ weight, total, mean, scale, *norm, residual)
            of_branch = None if ctx.branch is None else of_total.to(ctx.branch)
            of_offset = None if ctx.offset is None else grad[..., : ctx.offset[0]].sum(0, dtype=ctx.offset[1])
        return of_total, of_branch, *norm_grads, weight_grad, of_offset, None


class _FeedForward(torch.autograd.Function):
    """t + W2 relu(W1 LN(t) + b1) + b2 with t = x + branch; keeps t and the hidden values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        eps: float,
    ) -> Tensor:
        total, y, mean, scale = normalise(x, branch, norm_weight, norm_bias, eps, weight1.dtype)
        hidden = linear_relu(y, weight1, bias1)
        del y
        out = F.linear(hidden, weight2, bias2)
        ctx.save_for_backward(total, mean, scale, norm_weight, norm_bias, weight1, weight2, hidden)
        ctx.eps, ctx.branch = eps, branch.dtype
        return out.add_(total) if out.dtype == total.dtype else (out + total).to(total.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, scale, norm_weight, norm_bias, weight1, weight2, hidden = ctx.saved_tensors
        with without_autocast(total):
            of_out = grad.to(weight2.dtype)
            grads2 = _weight_gradient(of_out, hidden), of_out.flatten(0, -2).sum(0)
            of_hidden = of_out @ weight2
            torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
            _, y, _, _ = normalise(total, None, norm_weight, norm_bias, ctx.eps, weight1.dtype)
            grads1 = _weight_gradient(of_hidden, y), of_hidden.flatten(0, -2).sum(0)
            del y
            of_y = of_hidden @ weight1
            del of_hidden
            norm = norm_weight, norm_bias, ctx.eps
            of_total, *norm_grads = norm_backward(of_y, total, mean, scale, *norm, residual=grad)
        return of_total, of_total.to(ctx.branch), *norm_grads, *grads1, *grads2, None


def _for_autocast(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """The parameters in the dtype that autocast wants for products, as they are without it."""
    if not _check.autocast(x.device.type):
        return parameters
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(p if p is None or p.dtype == torch.float64 else p.to(dtype) for p in parameters)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context for operations on ``x`` as they are written."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else contextlib.nullcontext()


def in_dtype_of(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the dtype of the first floating-point parameter in ``module``; as it is where there is none."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
    return x.to(dtype)


def _norm_parameters(norm: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps) of a norm that :func:`_fusion.token_norm` lets pass, (None, None, 0) of none."""
    return (norm.weight, norm.bias, norm.eps) if isinstance(norm, LayerNorm) else (None, None, 0.0)


def norm_projection(
    x: Tensor, branch: Tensor | None, norm: nn.Module, weight: Tensor, offset: Tensor | None = None
) -> Any:
    """t = x + branch and LN(t) W^T, to whose first channels ``offset`` is added: (B, N, D) -> (B, N, len(weight)).

    Where ``branch`` is None LN(x) W^T only.
    """
    norm_weight, norm_bias, eps = _norm_parameters(norm)
    parameters = _for_autocast(x, weight, offset)
    with without_autocast(x):
        return _NormProjection.apply(x, branch, norm_weight, norm_bias, *parameters, eps)


def feed_forward(x: Tensor, branch: Tensor, norm: nn.Module, linear1: nn.Linear, linear2: nn.Linear) -> Tensor:
    """t + FFN(LN(t)) with ReLU and t = x + branch: (B, N, D) -> (B, N, D)."""
    norm_weight, norm_bias, eps = _norm_parameters(norm)
    parameters = _for_autocast(x, linear1.weight, linear1.bias, linear2.weight, linear2.bias)
    with without_autocast(x):
        return _FeedForward.apply(x, branch, norm_weight, norm_bias, *parameters, eps)


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
        if grid_core_is_faster(qkv):
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
