"""Checks that the modules and the models share."""

import torch


def positive_ints(**values):
    """Check that every value is an int of at least 1."""
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an int of at least 1; got {value!r}")


def flags(**values):
    """Check that every value is a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")


def _autocast(device):
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def image(x, weight, name="x"):
    """Check that ``x`` is a (B, C, H, W) image for a convolution with ``weight``.

    Raises:
        TypeError: not a floating-point tensor, or of another dtype than ``weight`` outside autocast.
        ValueError: another rank, channel count or device, or no rows or columns.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor; got {got}")
    channels = weight.shape[1]
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f"{name} must be (B, {channels}, H, W) with H and W at least 1; got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device}, the weights are on {weight.device}")
    if x.dtype != weight.dtype and not _autocast(x.device.type):
        raise TypeError(f"{name} must have the weights' dtype {weight.dtype}, or run under autocast; got {x.dtype}")
