"""Checks that the modules and the models share."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

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


def numbers(name: str, value: object, count: int, images: Tensor, images_name: str, *, floats: bool = False) -> None:
    """Check that ``value`` is (B,), a number from 0 to ``count`` - 1 for each of ``images`` (B, ...).

    Values are checked on the CPU only, as reading them would make an accelerator wait.

    Raises:
        TypeError, ValueError: wrong type, shape, device or, on the CPU, value.
    """
    kinds = "an int64, int32 or floating-point" if floats else "an int64 or int32"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {kinds} tensor; got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32) and not (floats and value.is_floating_point()):
        raise TypeError(f"{name} must be {kinds} tensor; got {value.dtype}")
    if value.shape != images.shape[:1]:
        raise ValueError(f"{name} must be ({images.shape[0]},), one for each image; got {tuple(value.shape)}")
    if value.device != images.device:
        raise ValueError(f"{name} must be on {images.device} as {images_name}; got {value.device}")
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return
    if isinstance(value, FakeTensor):  # it has no values
        return
    least, most = (bound.item() for bound in value.aminmax())
    if not (least >= 0 and most <= count - 1):  # NaN, too
        raise ValueError(f"{name} must be 0 to {count - 1}; got {least if not least >= 0 else most}")


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
