"""Blur of a shaken camera and of a lens out of focus, in linear light as sensors sum it.

Where a kernel reaches over the border of an image, the pixels of the border are repeated.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GAMMA = 2.2  # of sRGB, about, as the GoPro data set has it (Nah et al., CVPR 2017)
STEPS = 200  # of a camera's path
MOTION = (2.0, 30.0)  # lengths of paths in pixels
RADII = (0.5, 7.0)  # of discs in pixels


def motion_blur(image: Tensor, generator: torch.Generator, length: tuple[float, float] = MOTION) -> Tensor:
    """The photo of a camera that moves while its shutter is open, see :func:`camera_path`.

    Args:
        image: (C, H, W) floating point in [0, 1].
        generator: source of the path, on the CPU.
        length: shortest and longest path in pixels, drawn uniformly.

    Returns:
        (C, H, W) in the dtype of ``image``. Its blur is centred, so that the photo stays in its place.
    """
    return blurred(image, path_kernel(camera_path(_uniform(*length, generator), generator)))


def camera_path(length: float, generator: torch.Generator) -> Tensor:
    """Where a point of the scene lies while a shaking hand holds the camera.

    Boracchi and Foi, "Modeling the performance of image restoration from motion blur", TIP 2012, with the ranges of
    DeblurGAN (Kupyn et al., CVPR 2018): the velocity keeps its size and changes its direction by inertia, by a random
    push at every step, by a pull to the middle, and now and then by a sudden turn.

    Args:
        length: of the path in pixels.
        generator: source of all that is drawn, on the CPU.

    Returns:
        (STEPS, 2) float32, rows and columns in pixels.
    """
    shake, turns, push, pull, angle = torch.rand(5, generator=generator).tolist()
    stride, turns = length / (STEPS - 1), 0.2 * shake * turns
    # "shake" is the paper's anxiety: 0 leaves a straight line.
    pushes = (10 * shake * push * stride * torch.randn(STEPS, 2, generator=generator)).tolist()
    chances = torch.rand(STEPS, 2, generator=generator).tolist()
    velocity = stride * complex(math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle))
    place, path = 0j, []
    for (down, right), (chance, turn) in zip(pushes, chances, strict=True):
        path.append((place.real, place.imag))
        change = complex(down, right) - 0.7 * shake * pull * stride * place
        if chance < turns:  # about the other way round
            change += 2 * velocity * complex(math.cos(math.pi + turn - 0.5), math.sin(math.pi + turn - 0.5))
        velocity += change
        velocity *= stride / max(abs(velocity), 1e-12)
        place += velocity
    return torch.tensor(path)


def path_kernel(path: Tensor) -> Tensor:
    """The blur of a point that spends the same time at every step of ``path`` (N, 2), which is centred on its mean.

    Returns:
        (K, K) float32 with K odd, of sum 1; steps between pixels are shared out bilinearly.
    """
    path = path - path.mean(0)
    half = math.ceil(path.abs().max().item()) + 1
    path, side = path + half, 2 * half + 1
    corner = path.floor()
    far = path - corner
    kernel = torch.zeros(side * side)
    for down in (0, 1):
        for right in (0, 1):
            weights = (far[:, 0] if down else 1 - far[:, 0]) * (far[:, 1] if right else 1 - far[:, 1])
            index = ((corner[:, 0] + down) * side + corner[:, 1] + right).long()
            kernel.index_add_(0, index, weights)
    return kernel.view(side, side) / len(path)


def defocus_blur(image: Tensor, generator: torch.Generator, radius: tuple[float, float] = RADII) -> Tensor:
    """The photo of a lens out of focus: a disc, the image that geometrical optics gives a point (thin lens).

    Args:
        image: (C, H, W) floating point in [0, 1].
        generator: source of the radius, on the CPU.
        radius: smallest and largest one in pixels, drawn uniformly.

    Returns:
        (C, H, W) in the dtype of ``image``.
    """
    return blurred(image, disc_kernel(_uniform(*radius, generator)))


def dual_pixel_blur(image: Tensor, generator: torch.Generator, radius: tuple[float, float] = RADII) -> Tensor:
    """The two views that a dual-pixel sensor has of a scene out of focus: each through one half of the lens.

    Punnappurath et al., "Modeling Defocus-Disparity in Dual-Pixel Sensors", ICCP 2020: the kernels of the views are
    mirror images of each other that together make the disc; which one is which tells whether the scene lies in front of
    the focal plane or behind it, and is drawn too. Here they are the halves of the disc without their model's decay.

    Args:
        image, generator, radius: as of :func:`defocus_blur`.

    Returns:
        (2C, H, W), the left view and then the right one, in the dtype of ``image``; their mean is the blurred photo,
        but for the curve between light and sRGB.
    """
    disc = disc_kernel(_uniform(*radius, generator))
    middle = disc.shape[1] // 2
    share = torch.ones(disc.shape[1])  # of each column that the left half has
    share[middle], share[middle + 1 :] = 0.5, 0
    left = 2 * disc * share
    behind = torch.rand((), generator=generator) < 0.5
    views = (left.flip(1), left) if behind else (left, left.flip(1))
    return torch.cat([blurred(image, view) for view in views])


def disc_kernel(radius: float) -> Tensor:
    """(K, K) float32 with K odd, of sum 1: a disc of this radius in pixels; pixels on its edge count in part."""
    half = math.ceil(radius + 0.5)
    rows, columns = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
    disc = (radius + 0.5 - torch.hypot(rows, columns)).clamp(0, 1)
    return disc / disc.sum()


def blurred(image: Tensor, kernel: Tensor) -> Tensor:
    """``image`` (C, H, W) in sRGB, in [0, 1], convolved with ``kernel`` (K, K), K odd, in linear light; as large.

    Raises:
        TypeError: ``image`` is not floating point. ValueError: it has another shape.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1]; got {image.dtype}")
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(f"image must be (C, H, W); got {tuple(image.shape)}")
    exact = image.to(torch.promote_types(image.dtype, torch.float32))  # FFT has no 16 bits on the CPU
    light = F.pad(exact.clamp(0, 1) ** GAMMA, [kernel.shape[0] // 2] * 4, mode="replicate")
    return (convolved(light, kernel.to(exact)).clamp(0, 1) ** (1 / GAMMA)).to(image.dtype)


def convolved(planes: Tensor, kernel: Tensor) -> Tensor:
    """``planes`` (C, H, W) convolved with ``kernel`` (K, K) where it lies within them: (C, H - K + 1, W - K + 1).

    By FFT, which takes a tenth of the time of a direct convolution with the kernels here; zeros become about 1e-7.
    """
    size, side = planes.shape[1:], kernel.shape[0] - 1
    product = torch.fft.rfft2(planes) * torch.fft.rfft2(kernel, s=size)
    return torch.fft.irfft2(product, s=size)[:, side:, side:]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()
