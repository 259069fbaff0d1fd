"""Bicubic resizing as MATLAB does it, which is how the field's tables of super-resolution shrink images."""

import math

import numpy as np
import torch
from torch import Tensor

CUBIC = -0.5  # the parameter a of the cubic kernel (Keys, 1981), as MATLAB has it


def imresize(image: Tensor, scale: float) -> Tensor:
    """Bicubic resizing as MATLAB's ``imresize(image, scale)`` of floating-point images: antialiased, not clipped.

    The kernel is Keys' cubic (a = -1/2), stretched by 1 / scale where the image shrinks, with weights that sum to one
    and edges continued by reflection.

    Args:
        image: (..., H, W) floating point.
        scale: positive; 1 / 2 halves the image.

    Returns:
        (..., ceil(scale H), ceil(scale W)) in the dtype of ``image``.

    Raises:
        TypeError: ``image`` is not floating point.
        ValueError: ``scale`` is not positive and finite, or ``image`` has fewer than two dimensions.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point; got {image.dtype}")
    if image.dim() < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"image must be (..., H, W) with H and W at least 1; got {tuple(image.shape)}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite; got {scale}")
    rows, columns = (_resize_matrix(size, scale).to(image) for size in image.shape[-2:])
    return rows @ image @ columns.T


def resized(image: np.ndarray, scale: float) -> np.ndarray:
    """(H, W, C) as :func:`imresize` resizes it, float64."""
    channels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float64)).permute(2, 0, 1)
    return imresize(channels, scale).permute(1, 2, 0).numpy()


def shrunk(image: np.ndarray, scale: int) -> np.ndarray:
    """(H, W, C) in [0, 1] as the input of super-resolution: bicubic, clipped and rounded to 8 bits."""
    if 0 in image.shape:
        raise ValueError(f"image must have at least {scale} pixels a side to be shrunk {scale} times; got fewer")
    return np.rint(255 * np.clip(resized(image, 1 / scale), 0, 1)) / 255


def shrink(image: Tensor, scale: int) -> Tensor:
    """An integer image (C, H, W) made ``scale`` times smaller as :func:`imresize` does it, rounded, in its dtype."""
    if scale == 1:
        return image
    top = 255 if image.dtype == torch.uint8 else 65535
    result = image.float()
    for _ in range(2):  # rows, then columns; by taps, as matrices of a camera's photo would be large
        index, weight = _resize_weights(result.shape[1], 1 / scale)
        rows = torch.zeros(len(result), len(index), result.shape[2])
        for place, taken in zip(index.T, weight.float().T, strict=True):
            if taken.any():
                rows.addcmul_(result[:, place], taken[:, None])
        result = rows.transpose(1, 2).contiguous()
    return result.round().clamp(0, top).to(image.dtype)


def _resize_matrix(size: int, scale: float) -> Tensor:
    """(ceil(scale size), size) float64: row i has the weights of output i."""
    index, weight = _resize_weights(size, scale)
    return torch.zeros(len(index), size, dtype=torch.float64).scatter_add_(1, index, weight)


def _resize_weights(size: int, scale: float) -> tuple[Tensor, Tensor]:
    """(ceil(scale size), taps): the places that each output is made of, and their weights, float64."""
    # 1e-9: the product of a size and a fraction such as 1 / 3 may come out just above an integer.
    length, stretch = math.ceil(scale * size - 1e-9), max(1 / scale, 1.0)
    centre = (torch.arange(length, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = math.ceil(4 * stretch) + 2
    index = (centre - 2 * stretch).floor()[:, None] + torch.arange(taps, dtype=torch.float64)
    weight = _cubic((centre[:, None] - index) / stretch)
    weight /= weight.sum(1, keepdim=True)
    index = index.long() % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index), weight


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
    far = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
