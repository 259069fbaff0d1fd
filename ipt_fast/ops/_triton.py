"""The Triton backend of an operator: functions of ipt_fast.kernels with the operator's name and arguments."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from . import _limits
from ._operator import Arguments, Kernel, Operator, as_channels_last


@functools.cache
def _too_old(device: int | None) -> str | None:
    gpu, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return _limits.capability_error(gpu, capability, "the kernels")


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


def depthwise_limit(depthwise_weight: Tensor) -> str | None:
    """None if the kernels take this depthwise weight, else the reason."""
    size = depthwise_weight.shape[-1]
    return None if size <= 7 else f"the kernels take depthwise kernels up to 7 x 7; these are {size} x {size}"


def check(args: Arguments | None) -> str | None:
    """None if Triton's kernels run on the device and the dtype of the first of ``args`` (None: in general)."""
    if error := _extension.triton_error():
        return error
    if args is None:
        return _check_machine()
    return _check_device(args[0].device) or _limits.dtype_error(args[0].dtype, "Triton's kernels")


def _is_view_of_channels(x: Tensor) -> bool:
    """Whether ``x`` holds some of the channels of a channels-last map."""
    _, channels, height, width = x.shape
    pixel = x.stride(3)
    return pixel >= channels and x.stride() == (height * width * pixel, 1, width * pixel, pixel)


def register(operator: Operator, limits: _limits.Limits | None = None, *, views: bool = False) -> None:
    """Give ``operator`` the backend "triton": functions ``<name>`` and ``<name>_backward`` of ipt_fast.kernels.

    They get images channels-last and all other tensors contiguous.

    Args:
        operator: the `Operator`.
        views: images may also be views of channels of a channels-last map.
        limits: function of some of the operator's arguments, which its parameters name. It answers None or why the
            kernels do not take them.
    """
    limits_of = _limits.by_name(operator, limits)

    def check_all(args: Arguments | None) -> str | None:
        return check(args) or (None if args is None else limits_of(args))

    def prepare(args: Arguments) -> list[Any]:
        named = zip(operator.arguments, args, strict=True)
        return [laid_out(name, value) if isinstance(value, torch.Tensor) else value for name, value in named]

    def laid_out(name: str, value: Tensor) -> Tensor:
        if name not in operator.images:
            return value.contiguous()
        return value if views and _is_view_of_channels(value) else as_channels_last(value)

    def forward(*args: Any) -> Tensor:
        return function(operator.name)(*prepare(args))

    def backward(grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
        grad = as_channels_last(grad) if operator.images else grad.contiguous()
        return function(f"{operator.name}_backward")(grad, *prepare(args))

    operator.kernels["triton"] = Kernel(check_all, forward, backward)
