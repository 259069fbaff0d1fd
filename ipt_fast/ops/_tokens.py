"""What the layers of the IPT body are made of but plain products, and which kernel computes it: PyTorch's or ours."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import _cpu, _select, _triton
from ._operator import OPERATORS, Shape
from .grid_attention import grid_attention

SQUARES = {side**2 for side in range(1, 17)}


def _fuses(x: Tensor, norm_weight: Tensor | None) -> bool:
    """Whether Triton's kernel adds and normalises; compiled code is left to the compiler."""
    if norm_weight is None or torch.compiler.is_compiling() or _select.policy() not in ("auto", "triton"):
        return False
    return _select.choose(OPERATORS["layer_norm_2d"], (x, norm_weight, None, 0.0, True)) == "triton"


def normalise(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(t = x + branch, LN(t) in ``dtype``, mean and 1 / standard deviation of aten's).

    ``branch`` may be None, then t is x; without a norm (``weight`` None) LN(t) is t.
    """
    if _fuses(x, weight):
        return *_triton.function("add_layer_norm")(x, branch, weight, bias, eps, dtype), None, None
    total = x if branch is None else (x + branch).to(x.dtype)
    if weight is None:
        return total, total.to(dtype), None, None
    y, mean, scale = torch.native_layer_norm(total, x.shape[-1:], weight, bias, eps)
    return total, y.to(dtype), mean, scale


def norm_backward(
    grad: Tensor,
    total: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of t, to which ``residual`` (None for none) is added, of weight and of bias."""
    if weight is not None and mean is None:
        return _triton.function("add_layer_norm_backward")(grad, total, weight, bias, eps, residual)
    grads = grad.to(total.dtype), None, None
    if weight is not None:
        arguments = grads[0], total, total.shape[-1:], mean, scale, weight, bias, [True, True, True]
        grads = torch.ops.aten.native_layer_norm_backward(*arguments)
    return grads if residual is None else (grads[0] + residual, *grads[1:])


def grid_core_is_faster(qkv: Tensor) -> bool:
    """Whether attention among the tokens of ``qkv`` (B, N, 3D) is the C++ core's for grids, all tokens one grid.

    As measured beside SDPA (`python -m benchmarks.ipt`): up to 16 x 16 tokens, but not in 16 bits without a backward.
    """
    if torch.compiler.is_compiling() or qkv.device.type != "cpu" or qkv.shape[1] not in SQUARES or len(qkv) == 0:
        return False
    if _select.policy() not in ("auto", "cpu"):
        return False
    if _cpu.check((qkv,)) is not None:
        _select.warn_without_kernels("cpu")
        return False
    return qkv.dtype == torch.float32 or (torch.is_grad_enabled() and qkv.requires_grad)


def attend_as_a_grid(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V among all tokens of ``qkv`` (B, N, 3D), N a square: (B, N, D)."""
    side = math.isqrt(qkv.shape[1])
    tokens = qkv.transpose(1, 2).unflatten(2, (side, side))  # a view: channels-last
    return grid_attention(tokens, num_heads=num_heads, grid_size=side).flatten(2).transpose(1, 2)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(x W^T + b), on NVIDIA GPUs in the epilogue of cuBLASLt's product."""
    rows = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.T)
    return rows.view(*x.shape[:-1], len(weight))


if torch.ops.aten._addmm_activation not in flop_registry:

    @register_flop_formula(torch.ops.aten._addmm_activation)
    def _product_flops(bias: Shape, a: Shape, b: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * a[0] * a[1] * b[1]
