"""Padding images to the sizes that models take, and cropping what they return."""

import torch
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right to sides that are multiples, see :func:`pad_to_size`."""
    height, width = ((size + multiple - 1) // multiple * multiple for size in x.shape[2:])
    return pad_to_size(x, height, width)


def pad_to_size(x: Tensor, height: int, width: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right: reflect up to size - 1 rows or columns, then replicate."""
    for axis, length in ((2, height), (3, width)):
        size = x.shape[axis]
        index = torch.arange(length, device=x.device)
        x = x.index_select(axis, ((size - 1) - (size - 1 - index).abs()).clamp(min=0))
    return x


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The top left (height, width) of a map, as a copy: a view's strides would tie a compiled graph to one size."""
    for axis, size in ((2, height), (3, width)):
        x = x.index_select(axis, torch.arange(size, device=x.device))
    return x
