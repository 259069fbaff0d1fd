"""The Triton backend of an operator: functions of ipt_fast.kernels with the operator's name and arguments."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ._operator import Arguments, Kernel, Operator, as_channels_last

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)


@functools.cache
def _too_old(device: int | None) -> str | None:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    return f"the kernels need compute capability 8.0 or later; {name} has {capability[0]}.{capability[1]}"


def _interpreted() -> bool:
    return _extension.triton_error() is None and importlib.import_module("triton").knobs.runtime.interpret


def _check_machine() -> str | None:
    if torch.cuda.is_available() or _interpreted():
        return None
    return "PyTorch finds no NVIDIA GPU here (TRITON_INTERPRET=1 runs Triton's kernels on the CPU, slowly)"


def _check_device(device: torch.device) -> str | None:
    interpreted = _interpreted()
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 runs kernels on CPU tensors only" if interpreted else _too_old(device.index)
    if device.type == "cpu" and interpreted:
        return None
    return f"Triton's kernels run on NVIDIA GPUs, or on the CPU with TRITON_INTERPRET=1; the tensors are on {device}"


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """One of ipt_fast.kernels."""
    return getattr(importlib.import_module("ipt_fast.kernels"), name)


def head_limit(channels: int, num_heads: int) -> str | None:
    """None, or why Triton's kernels do not take heads of this width."""
    width = channels // num_heads
    return None if width <= 128 else f"Triton's kernels take heads of up to 128 channels; these have {width}"


def depthwise_limit(weight: Tensor) -> str | None:
    """None if the kernels take this depthwise weight, else the reason."""
    size = weight.shape[-1]
    return None if size <= 7 else f"the kernels take depthwise kernels up to 7 x 7; these are {size} x {size}"


def register(operator: Operator, limits: Callable[..., str | None] | None = None) -> None:
    """Give ``operator`` the backend "triton": functions ``<name>`` and ``<name>_backward`` of ipt_fast.kernels.

    They get images channels-last and all other tensors contiguous. ``limits(*args)`` answers None or why the kernels
    do not take the arguments.
    """

    def check(args: Arguments | None) -> str | None:
        if error := _extension.triton_error():
            return error
        if args is None:
            return _check_machine()
        if reason := _check_device(args[0].device):
            return reason
        if args[0].dtype not in DTYPES:
            return f"Triton's kernels take float32, bfloat16 and float16; the tensors are {args[0].dtype}"
        return limits(*args) if limits else None

    def prepare(args: Arguments) -> list[Any]:
        named = zip(operator.arguments, args, strict=True)
        return [
            value
            if not isinstance(value, torch.Tensor)
            else (as_channels_last(value) if name in operator.images else value.contiguous())
            for name, value in named
        ]

    def forward(*args: Any) -> Tensor:
        return function(operator.name)(*prepare(args))

    def backward(grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
        grad = as_channels_last(grad) if operator.images else grad.contiguous()
        return function(f"{operator.name}_backward")(grad, *prepare(args))

    operator.kernels["triton"] = Kernel(check, forward, backward)
