"""Checks that the modules and the models share."""

import torch
from torch import Tensor, nn

from . import _fusion


def positive_ints(**values: object) -> None:
    """Check that every value is an int of at least 1."""
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an int of at least 1; got {value!r}")


def flags(**values: object) -> None:
    """Check that every value is a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")


def autocast(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def image(x: object, channels: int, module: nn.Module | None, name: str = "x") -> None:
    """Check that ``x`` is a (B, C, H, W) image with ``channels`` channels, for ``module``, which takes it first.

    Device and dtype are compared with the module's weight if the module is as it was made (None: do not compare):
    adapters, quantisation and offloading have rules of their own.

    Raises:
        TypeError: not a floating-point tensor, or of a dtype that does not go with the weights.
        ValueError: another rank, channel count or device, or no rows or columns.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor; got {got}")
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f"{name} must be (B, {channels}, H, W) with H and W at least 1; got {tuple(x.shape)}")
    if module is None or _fusion.changed(module) is not None:
        return
    weight = module.weight
    if x.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} as the weights; got {x.device}")
    if x.dtype == weight.dtype:
        return
    if not autocast(x.device.type):
        raise TypeError(f"{name} must have the weights' dtype {weight.dtype}, or run under autocast; got {x.dtype}")
    if torch.float64 in (x.dtype, weight.dtype):
        raise TypeError(
            f"{name} must have the weights' dtype {weight.dtype}, as autocast leaves float64 as it is; got {x.dtype}"
        )
