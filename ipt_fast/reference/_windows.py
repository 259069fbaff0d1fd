"""Cutting a map into windows and putting it together again."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor) -> Tensor:
    """``x`` with the last axis of length 1; zeros stay zeros in every dtype, in which 1e-12 itself may be zero."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a size, which is one number where both are the same."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def pad_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad (B, C, H, W) at the bottom and right to multiples of ``rows`` and ``columns``."""
    height, width = x.shape[-2:]
    # Not by remainders: of these, tracing for export simplifies the sizes in two thirds of the time.
    below, right = (height + rows - 1) // rows * rows - height, (width + columns - 1) // columns * columns - width
    return F.pad(x, (0, right, 0, below))


def partition(x: Tensor, heads: int, size: int) -> Tensor:
    """(B, C, H, W), sizes divisible by ``size`` -> (B, H/p, W/p, heads, C/heads, p*p), tokens in raster order."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, heads, channels // heads, height // size, size, width // size, size)
    return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(-2)


def reverse(windows: Tensor, size: int) -> Tensor:
    """The inverse of :func:`partition`."""
    batch, rows, columns, heads, width, _ = windows.shape
    x = windows.unflatten(-1, (size, size)).permute(0, 3, 4, 1, 5, 2, 6)
    return x.reshape(batch, heads * width, rows * size, columns * size)
