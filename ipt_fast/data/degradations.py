"""Synthetic degradations that make training pairs from clean images (IPT, eq. 3)."""

import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F

from .resize import CUBIC as CUBIC  # this name and imresize were defined here once
from .resize import imresize


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
    _check_image(image)
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be finite and at least 0; got {sigma}")
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)
    return image + noise * (sigma / 255)


def add_rain(
    image: Tensor,
    generator: torch.Generator,
    *,
    density: float,
    length: float,
    angle: float,
    width: float = 1.5,
    brightness: float = 0.5,
) -> Tensor:
    """Add bright streaks, all in one direction: I + r (IPT, section 3.2), r as in Yang et al., CVPR 2017.

    Drops fall on random pixels with random brightness; each is drawn out along a line.

    Args:
        image: (C, H, W) floating point in [0, 1].
        generator: source of the drops, on the CPU.
        density: share of the pixels that streaks cover, about; from 0 to 1.
        length: of a streak, in pixels, at least 1.
        angle: of the streaks to the vertical, in degrees; positive ones lean to the right.
        width: of a streak, in pixels, positive.
        brightness: of the brightest streak, in (0, 1].

    Returns:
        The rainy image, clipped to at most 1 as a camera does, in the shape and dtype of ``image``.

    Raises:
        TypeError: ``image`` is not floating point. ValueError: another argument is out of its range.
    """
    _check_image(image)
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(f"image must be (C, H, W) and not empty; got {tuple(image.shape)}")
    ranges = {"density": (density, 0, 1), "length": (length, 1, 1e4), "angle": (angle, -90, 90)}
    for name, (value, low, high) in (ranges | {"width": (width, 0.1, 1e3), "brightness": (brightness, 0, 1)}).items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}]; got {value}")
    kernel = _streak(length, angle, width)
    margin = kernel.shape[0] // 2  # drops outside of the image streak into it
    height, across = (size + 2 * margin for size in image.shape[1:])
    drops = torch.rand(height, across, generator=generator)
    share = min(density / (length * width), 1.0)
    drops = torch.where(drops < share, torch.rand(height, across, generator=generator), 0.0)
    streaks = F.conv2d(drops[None, None], kernel[None, None]).clamp(max=1)[0]
    return (image + brightness * streaks.to(image)).clamp(max=1)


def _streak(length: float, angle: float, width: float) -> Tensor:
    """A square map of odd side: a line of this length and width, brightest in the middle, where it is 1."""
    half = math.ceil((length + width) / 2) + 1
    y, x = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    along, aside = x * sine - y * cosine, x * cosine + y * sine
    fading = (1 - (along / ((length + 1) / 2)).square()).clamp(min=0)
    return fading * ((width + 1) / 2 - aside.abs()).clamp(0, 1)


def random_rain(image: Tensor, generator: torch.Generator) -> Tensor:
    """:func:`add_rain` with everything drawn at random, in the ranges of light rain."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    return add_rain(
        image,
        generator,
        density=draw(0.05, 0.4),
        length=draw(8, 40),
        angle=draw(-35, 35),
        width=draw(0.8, 2.5),
        brightness=draw(0.2, 0.7),
    )


def degrade(image: Tensor, task: str, generator: torch.Generator, sigma: tuple[float, float] = (5, 50)) -> Tensor:
    """A clean image as the input of a task.

    Args:
        image: (C, H, W) floating point in [0, 1].
        task: "sr_x<n>" (shrunk n times by :func:`ipt_fast.data.resize.imresize`), "derain", "denoise<σ>", or "denoise"
            with a level drawn from ``sigma``.
        generator: source of noise and rain, on the CPU.

    Raises:
        ValueError: another task.
    """
    match = re.fullmatch(r"(sr_x|denoise|derain)(\d*)", task)
    kind, number = match.groups() if match else ("", "")
    if kind == "sr_x" and number:
        return imresize(image, 1 / int(number)).clamp(0, 1)
    if kind == "denoise":
        return add_gaussian_noise(image, float(number) if number else random_sigma(*sigma, generator), generator)
    if kind == "derain" and not number:
        return random_rain(image, generator)
    raise ValueError(f"task must be sr_x<n>, derain, denoise or denoise<σ>; got {task!r}")


def _check_image(image: Tensor) -> None:
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1]; got {image.dtype}")
