"""Synthetic degradations that make training pairs from clean images (IPT, eq. 3)."""

import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F

CUBIC = -0.5  # the parameter a of the cubic kernel (Keys, 1981), as MATLAB has it


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
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)
    return image + noise * (sigma / 255)


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
    _check_image(image)
    if image.dim() < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"image must be (..., H, W) with H and W at least 1, got {tuple(image.shape)}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    rows, columns = (_resize_matrix(size, scale).to(image) for size in image.shape[-2:])
    return rows @ image @ columns.T


def _resize_matrix(size: int, scale: float) -> Tensor:
    """(ceil(scale size), size) float64: row i has the weights of output i."""
    # 1e-9: the product of a size and a fraction such as 1 / 3 may come out just above an integer.
    length, stretch = math.ceil(scale * size - 1e-9), max(1 / scale, 1.0)
    centre = (torch.arange(length, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = math.ceil(4 * stretch) + 2
    index = (centre - 2 * stretch).floor()[:, None] + torch.arange(taps, dtype=torch.float64)
    weight = _cubic((centre[:, None] - index) / stretch)
    weight /= weight.sum(1, keepdim=True)
    index = index.long() % (2 * size)
    index = torch.where(index < size, index, 2 * size - 1 - index)
    return torch.zeros(length, size, dtype=torch.float64).scatter_add_(1, index, weight)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
    far = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


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
        raise ValueError(f"image must be (C, H, W) and not empty, got {tuple(image.shape)}")
    ranges = {"density": (density, 0, 1), "length": (length, 1, 1e4), "angle": (angle, -90, 90)}
    for name, (value, low, high) in (ranges | {"width": (width, 0.1, 1e3), "brightness": (brightness, 0, 1)}).items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
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
        task: "sr_x<n>" (shrunk n times by :func:`imresize`), "derain", "denoise<σ>", or "denoise" with a level drawn
            from ``sigma``.
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
    raise ValueError(f"task must be sr_x<n>, derain, denoise or denoise<σ>, got {task!r}")


def _check_image(image: Tensor) -> None:
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}")
