"""Backends of operators on tokens: a short fixed sequence of PyTorch's own kernels, in which Triton's norm may stand.

The products are PyTorch's everywhere. "cpu" and "cuda" are the sequence with PyTorch's norm, and need no compiled
extension. "triton" is the sequence with one kernel that adds the branch and normalises; "auto" takes it on GPUs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _limits, _triton
from ._operator import Arguments, Kernel, Operator


class Norm(NamedTuple):
    """How a sequence adds and normalises tokens (B, N, D).

    ``forward(x, branch, weight, bias, eps, dtype)`` returns (t = x + branch in the dtype of ``x``, LN(t) in ``dtype``,
    statistics); without a branch t is ``x``, without a weight LN(t) is t.
    ``backward(grad, total, statistics, weight, bias, eps, residual)`` returns the gradients of t, to which ``residual``
    (None for none) is added, of weight and of bias.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


def _add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Any]:
    total = x if branch is None else (x + branch).to(x.dtype)
    if weight is None:
        return total, total.to(dtype), None
    y, mean, scale = torch.native_layer_norm(total, x.shape[-1:], weight, bias, eps)
    return total, y.to(dtype), (mean, scale)


def _add_norm_backward(
    grad: Tensor,
    total: Tensor,
    statistics: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grads = grad.to(total.dtype), None, None
    if weight is not None:
        wanted = [True, True, bias is not None]
        arguments = grads[0], total, total.shape[-1:], *statistics, weight, bias, wanted
        grads = torch.ops.aten.native_layer_norm_backward(*arguments)
    return grads if residual is None else (grads[0] + residual, *grads[1:])


def _triton_add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Any]:
    if weight is None:
        return _add_norm(x, branch, weight, bias, eps, dtype)
    norm = weight.contiguous(), None if bias is None else bias.contiguous()
    return *_triton.function("add_layer_norm")(x, branch, *norm, eps, dtype), None


def _triton_add_norm_backward(
    grad: Tensor,
    total: Tensor,
    statistics: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if weight is None:
        return _add_norm_backward(grad, total, statistics, weight, bias, eps, residual)
    norm = weight.contiguous(), None if bias is None else bias.contiguous()
    return _triton.function("add_layer_norm_backward")(grad, total.contiguous(), *norm, eps, residual)


PYTORCH = Norm(_add_norm, _add_norm_backward)
TRITON = Norm(_triton_add_norm, _triton_add_norm_backward)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """That of W in x W^T, of tokens."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


def _norm_limit(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> str | None:
    """None, or why PyTorch's norm does not take parameters of these dtypes."""
    found = {parameter.dtype for parameter in (norm_weight, norm_bias) if parameter is not None}
    mixed = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    if found <= {x.dtype} or (mixed and found == {torch.float32}):
        return None
    others = ", or float32 beside 16 bits on the CPU" if x.dtype != torch.float64 else ""
    got = " and ".join(sorted(map(str, found)))
    return f"PyTorch's norm takes parameters in the dtype of the tokens{others}; these are {got} beside {x.dtype}"


def register(
    operator: Operator,
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor | None]],
) -> None:
    """Give ``operator``, whose first argument is x, the backends "cpu", "cuda" and "triton".

    Args:
        operator: the `Operator`; it has the arguments ``norm_weight`` and ``norm_bias``.
        forward, backward: of a `Kernel`, with the `Norm` to take in front of the other arguments.
    """
    limits_of = _limits.by_name(operator, _norm_limit)

    def check_on(device: str, args: Arguments | None) -> str | None:
        if args is None:
            missing = device == "cuda" and not torch.cuda.is_available()
            return "PyTorch finds no NVIDIA GPU here" if missing else None
        if (got := args[0].device).type != device:
            return f"PyTorch's kernels of this backend run on {device} tensors; these are on {got}"
        return limits_of(args)

    def without_triton(args: Arguments) -> bool:
        return _triton.check(args) is not None

    def kernel(norm: Norm, check: Callable[..., str | None], **changes: Any) -> Kernel:
        return Kernel(check, functools.partial(forward, norm), functools.partial(backward, norm), **changes)

    operator.kernels["cpu"] = kernel(PYTORCH, functools.partial(check_on, "cpu"))
    operator.kernels["triton"] = kernel(TRITON, _triton.check)
    operator.kernels["cuda"] = kernel(PYTORCH, functools.partial(check_on, "cuda"), automatic=without_triton)
