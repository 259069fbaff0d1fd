"""Synthetic degradations that make training pairs from clean images (IPT, eq. 3), by the names of tasks.

Each is a pure function of an image and a generator. :data:`DEGRADATIONS` lists them; a new one is a line there.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .blur import convolved, defocus_blur, dual_pixel_blur, motion_blur
from .camera import camera_noise
from .camera import jpeg as add_jpeg_artefacts
from .resize import CUBIC as CUBIC  # this name and imresize were defined here once
from .resize import imresize

QUALITIES = (10, 95)  # of JPEG, drawn uniformly, as FBCNN was trained (Jiang et al., ICCV 2021)


def random_sigma(low: float, high: float, generator: torch.Generator) -> float:
    """A noise level drawn uniformly from [low, high], on the 0..255 scale."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def add_gaussian_noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Additive white Gaussian noise, not clipped: the noise of DnCNN (Zhang et al., TIP 2017) and what followed it.

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


def add_alike_noise(image: Tensor, sigma: float, correlation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise that the channels share in part: of variance (sigma / 255)² in each, not clipped.

    n_c = sqrt(correlation) common + sqrt(1 - correlation) own_c, as real noise is after a camera has mixed its colours
    (Nam et al., "A Holistic Approach to Cross-Channel Image Noise Modeling", CVPR 2016).

    Args:
        image: (C, H, W) floating point.
        sigma: standard deviation on the 0..255 scale.
        correlation: of the noise of any two channels, from 0 (independent) to 1 (the same).
        generator: source of the noise, on the image's device.

    Raises:
        TypeError: ``image`` is not floating point. ValueError: another argument is out of its range.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must be in [0, 1]; got {correlation}")
    noisy = add_gaussian_noise(image, sigma * math.sqrt(1 - correlation), generator)
    common = add_gaussian_noise(torch.zeros_like(image[:1]), sigma * math.sqrt(correlation), generator)
    return noisy + common


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
    streaks = convolved(drops[None], kernel).clamp(max=1)
    streaks = torch.where(streaks < 1e-5, 0.0, streaks)  # what is no streak comes as about 1e-7
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


def gray_of(image: Tensor) -> Tensor:
    """ITU-R 601-2 luma of (3, H, W), as three equal channels; (1, H, W) as it is."""
    if image.shape[0] == 1:
        return image
    return torch.einsum("c,chw->hw", image.new_tensor([0.299, 0.587, 0.114]), image).expand_as(image)


@dataclass(frozen=True)
class Degradation:
    """A kind of task, whose name may end in a number.

    Args:
        apply: (image, number or None, range of noise levels, generator) -> input.
        summary: what it does, in a few words.
        number: what the number is, such as "<σ>"; "" where the name has none.
        optional: whether the number may be left out.
        least, most: of the number.
        views: how many images side by side in the channels the input has.
        gray: the photo itself is made gray.
        colour: it takes three channels.
        takes_sigma: without a number it draws its noise level from a range.
    """

    apply: Callable[[Tensor, int | None, tuple[float, float], torch.Generator], Tensor]
    summary: str
    number: str = ""
    optional: bool = False
    least: int = 1
    most: int = 255
    views: int = 1
    gray: bool = False
    colour: bool = False

    @property
    def takes_sigma(self) -> bool:
        return self.number == "<σ>"


def _denoise(image: Tensor, sigma: int | None, levels: tuple[float, float], generator: torch.Generator) -> Tensor:
    return add_gaussian_noise(image, random_sigma(*levels, generator) if sigma is None else sigma, generator)


def _gray_denoise(image: Tensor, sigma: int | None, levels: tuple[float, float], generator: torch.Generator) -> Tensor:
    return _denoise(gray_of(image)[:1], sigma, levels, generator).expand_as(image)


def _luma_denoise(image: Tensor, sigma: int | None, levels: tuple[float, float], generator: torch.Generator) -> Tensor:
    level = random_sigma(*levels, generator) if sigma is None else sigma
    equal, correlation = torch.rand(2, generator=generator).tolist()
    return add_alike_noise(image, level, 1.0 if equal < 0.5 else correlation, generator)


def _jpeg(image: Tensor, quality: int | None, levels: tuple[float, float], generator: torch.Generator) -> Tensor:
    drawn = torch.randint(QUALITIES[0], QUALITIES[1] + 1, (), generator=generator).item()
    return add_jpeg_artefacts(image.clamp(0, 1), int(drawn) if quality is None else quality).to(image)


DEGRADATIONS = {
    "sr_x": Degradation(
        lambda image, number, levels, generator: imresize(image, 1 / (number or 1)).clamp(0, 1),
        "super-resolution by n",
        "<n>",
        most=16,
    ),
    "derain": Degradation(lambda image, number, levels, generator: random_rain(image, generator), "light rain"),
    "denoise": Degradation(_denoise, "Gaussian noise", "<σ>", optional=True, least=0),
    "gray_denoise": Degradation(_gray_denoise, "Gaussian noise, gray", "<σ>", optional=True, least=0, gray=True),
    "luma_denoise": Degradation(
        _luma_denoise, "Gaussian noise that the channels share wholly or in part", "<σ>", optional=True, least=0
    ),
    "camera": Degradation(
        lambda image, number, levels, generator: camera_noise(image, generator).to(image),
        "noise of a camera",
        colour=True,
    ),
    "motion_deblur": Degradation(
        lambda image, number, levels, generator: motion_blur(image, generator), "a shaken camera"
    ),
    "defocus_deblur": Degradation(
        lambda image, number, levels, generator: defocus_blur(image, generator), "a lens out of focus"
    ),
    "dual_pixel_deblur": Degradation(
        lambda image, number, levels, generator: dual_pixel_blur(image, generator),
        "a lens out of focus, seen by both halves of the pixels: 6 channels in, 3 out",
        views=2,
    ),
    "jpeg": Degradation(_jpeg, "artefacts of JPEG", "<quality>", optional=True, most=100),
}


@dataclass(frozen=True)
class Task:
    """The name of a task, taken apart; see :func:`find_task`."""

    name: str
    kind: str
    number: int | None

    @property
    def degradation(self) -> Degradation:
        return DEGRADATIONS[self.kind]

    @property
    def scale(self) -> int:
        """How many times larger than the input the output is."""
        return self.number or 1 if self.kind == "sr_x" else 1

    @property
    def draws_sigma(self) -> bool:
        """Whether the noise level comes from a range."""
        return self.degradation.takes_sigma and self.number is None


def find_task(name: str) -> Task:
    """The task of a name such as "denoise25".

    Raises:
        ValueError: there is none, or its number is out of range.
    """
    match = re.fullmatch(rf"({'|'.join(DEGRADATIONS)})(\d*)", name)
    kind, digits = match.groups() if match else ("", "")
    known = DEGRADATIONS.get(kind)
    if known is None or bool(digits) > bool(known.number) or bool(known.number) > (bool(digits) or known.optional):
        raise ValueError(f"task must be {task_names()}; got {name!r}")
    if digits and not known.least <= int(digits) <= known.most:
        raise ValueError(
            f"task must be {kind}{known.number} with a number in [{known.least}, {known.most}]; got {name!r}"
        )
    return Task(name, kind, int(digits) if digits else None)


def described_tasks() -> dict[str, str]:
    """{"denoise[<σ>]": "Gaussian noise"} and so on, of all tasks."""
    numbers = {kind: f"[{each.number}]" if each.optional else each.number for kind, each in DEGRADATIONS.items()}
    return {kind + numbers[kind]: each.summary for kind, each in DEGRADATIONS.items()}


def task_names() -> str:
    """All names of tasks, for messages: "sr_x<n>, derain, denoise[<σ>] ..."."""
    *names, last = described_tasks()
    return f"{', '.join(names)} or {last}"


def target_of(image: Tensor, task: str) -> Tensor:
    """What a model should make of ``degrade(image, task, ...)``: the image (C, H, W), or its gray for a gray task."""
    return gray_of(image) if find_task(task).degradation.gray else image


def degrade(image: Tensor, task: str, generator: torch.Generator, sigma: tuple[float, float] = (5, 50)) -> Tensor:
    """A clean image as the input of a task.

    Args:
        image: (C, H, W) floating point in [0, 1].
        task: the name of a task, a key of :data:`DEGRADATIONS` and perhaps a number, such as "derain", "sr_x4",
            "denoise25", or "denoise" with a level drawn from ``sigma``.
        generator: source of all that is drawn, on the CPU.
        sigma: lowest and highest noise level on the 0..255 scale.

    Returns:
        (C, H, W) of the dtype of ``image``; for "sr_x<n>" H and W are divided by n, for "dual_pixel_deblur" there are
        twice as many channels.

    Raises:
        ValueError: another task, or one that cannot be made of such an image.
    """
    found = find_task(task)
    return found.degradation.apply(image, found.number, sigma, generator)


def _check_image(image: Tensor) -> None:
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1]; got {image.dtype}")
