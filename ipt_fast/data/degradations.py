"""Synthetic degradations that make training pairs from clean images."""

import torch
from torch import Tensor


def random_sigma(low: float, high: float, generator: torch.Generator) -> float:
    """A noise level drawn uniformly from [low, high], on the 0..255 scale."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def add_gaussian_noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Additive white Gaussian noise, not clipped.

    Args:
        image: floating point, any shape, nominally in [0, 1].
        sigma: standard deviation on the 0..255 scale, at least 0.
        generator: source of the noise, on the image's device.

    Returns:
        ``image + n``, n ~ N(0, (sigma / 255)²), in the shape and dtype of ``image``.

    Raises:
        TypeError: ``image`` is not floating point.
        ValueError: ``sigma`` is negative or not finite.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}")
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)
    return image + noise * (sigma / 255)
