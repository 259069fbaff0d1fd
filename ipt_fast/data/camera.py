"""Noise as a camera makes it: in the raw image, then carried through demosaicing, colours, tone curve and JPEG.

The camera is that of Brooks et al., "Unprocessing Images for Learned Raw Denoising", CVPR 2019: a photo is
turned back into a raw image, gets shot and read noise of a drawn level, and is developed again with the
same settings. JPEG follows, as in CBDNet (Guo et al., "Toward Convolutional Blind Denoising of Real Photographs", CVPR
2019). Between the two stands what cameras do and neither paper has: the noise is smoothed, its chroma more than
its luma. How much was chosen so that its correlations are those of real photos (the PolyU data set, Xu et al., 2018).
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of XYZ to camera, of four cameras (the paper's published program).
_XYZ_TO_CAMERA = torch.tensor(
    [
        [[1.0234, -0.2969, -0.2266], [-0.5625, 1.6328, -0.0469], [-0.0703, 0.2188, 0.6406]],
        [[0.4913, -0.0541, -0.0202], [-0.6130, 1.3513, 0.2906], [-0.1564, 0.2151, 0.7183]],
        [[0.8380, -0.2630, -0.0639], [-0.2887, 1.0725, 0.2496], [-0.0627, 0.1427, 0.5438]],
        [[0.6596, -0.2079, -0.0562], [-0.4782, 1.3016, 0.1933], [-0.0970, 0.1581, 0.5181]],
    ]
)
_SRGB_TO_XYZ = torch.tensor(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
SHOT_NOISE = (1e-4, 0.012)
QUALITY = (60, 100)
# Standard deviations in pixels of the Gaussians that smooth the noise.
LUMA_SMOOTHING, CHROMA_SMOOTHING = (0.0, 0.7), (1.0, 4.0)


@dataclass(frozen=True)
class Camera:
    """One drawn camera: how it sees colours, how it lifts them, and how noisy it is.

    Args:
        to_camera: (3, 3), from linear sRGB to the camera's colours, white to white.
        gains: (3,), by which developing multiplies the raw colours (white balance and exposure).
        shot_noise, read_noise: variance of the raw value x in [0, 1] is ``shot_noise * x + read_noise``.
        smoothing: standard deviations in pixels of the Gaussians that smooth the noise's luma and chroma.
        quality: of the JPEG, 1 to 100; None leaves it out.
    """

    to_camera: Tensor
    gains: Tensor
    shot_noise: float
    read_noise: float
    smoothing: tuple[float, float]
    quality: int | None


def random_camera(generator: torch.Generator, shot_noise: tuple[float, float] = SHOT_NOISE) -> Camera:
    """A camera drawn as the papers draw it (Brooks et al.; JPEG of quality 60 to 100 as in CBDNet), and its smoothing.

    Args:
        generator: source of everything that is drawn, on the CPU.
        shot_noise: lowest and highest shot noise; its logarithm is uniform between theirs.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    weights = torch.rand(4, generator=generator)
    to_camera = torch.einsum("k,kij->ij", weights / weights.sum(), _XYZ_TO_CAMERA) @ _SRGB_TO_XYZ
    exposure = 1 / (0.8 + 0.1 * torch.randn((), generator=generator).item())
    gains = torch.tensor([uniform(1.9, 2.4), 1.0, uniform(1.5, 1.9)]) * exposure
    log_shot = uniform(math.log(shot_noise[0]), math.log(shot_noise[1]))
    log_read = 2.18 * log_shot + 1.20 + 0.26 * torch.randn((), generator=generator).item()
    return Camera(
        to_camera / to_camera.sum(1, keepdim=True),
        gains,
        shot_noise=math.exp(log_shot),
        read_noise=math.exp(log_read),
        smoothing=(uniform(*LUMA_SMOOTHING), uniform(*CHROMA_SMOOTHING)),
        quality=round(uniform(*QUALITY)),
    )


def camera_noise(image: Tensor, generator: torch.Generator, camera: Camera | None = None) -> Tensor:
    """The photo as a noisy camera would have taken it.

    Args:
        image: (3, H, W) floating point in [0, 1], sRGB; any H and W from 2.
        generator: source of the camera and of the noise, on the CPU.
        camera: None draws one, see :func:`random_camera`.

    Returns:
        The noisy photo, (3, H, W) float32 in [0, 1], in steps of 1/255, as JPEG has 8 bits.

    Raises:
        TypeError: ``image`` is not floating point. ValueError: it has another shape.
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1]; got {image.dtype}")
    if image.dim() != 3 or image.shape[0] != 3 or min(image.shape[1:]) < 2:
        raise ValueError(f"image must be (3, H, W) of at least 2x2 pixels; got {tuple(image.shape)}")
    camera = camera or random_camera(generator)
    image = image.float().clamp(0, 1)
    raw = _undeveloped(image, camera)
    deviation = (camera.shot_noise * raw + camera.read_noise).sqrt()
    noise = deviation * torch.randn(raw.shape, generator=generator)
    noisy = _developed(_demosaiced(_mosaic(raw + noise)), camera)
    # Only the noise is taken over: demosaicing and tone curve must not cost the photo its sharpness.
    clean = _developed(_demosaiced(_mosaic(raw)), camera)
    noisy = (image + _smoothed(noisy - clean, *camera.smoothing)).clamp(0, 1)
    return noisy if camera.quality is None else jpeg(noisy, camera.quality)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """A photo after JPEG, with the chroma at half the size, as cameras write it.

    Args:
        image: (1 or 3, H, W) floating point in [0, 1].
        quality: 1 to 100 (libjpeg's scale).

    Returns:
        float32 in [0, 1], in steps of 1/255.
    """
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(file, "JPEG", quality=quality)
        decoded = np.array(PIL.Image.open(file))
    return torch.from_numpy(decoded.reshape(pixels.shape)).permute(2, 0, 1).float() / 255


def _undeveloped(image: Tensor, camera: Camera) -> Tensor:
    """sRGB to the camera's raw colours at every pixel, in [0, 1]."""
    linear = (0.5 - torch.sin(torch.asin(1 - 2 * image) / 3)).clamp(min=1e-8) ** 2.2
    raw = torch.einsum("ij,jhw->ihw", camera.to_camera, linear)
    # Highlights are not divided by the gains, or white would become gray.
    inverse = (1 / camera.gains).view(3, 1, 1)
    highlight = ((raw.mean(0, keepdim=True) - 0.9).clamp(min=0) / 0.1) ** 2
    return (raw * torch.maximum(highlight + (1 - highlight) * inverse, inverse)).clamp(0, 1)


def _developed(raw: Tensor, camera: Camera) -> Tensor:
    """Raw colours at every pixel to sRGB: white balance, colours, gamma 2.2 and the tone curve 3x² - 2x³."""
    balanced = (raw * camera.gains.view(3, 1, 1)).clamp(0, 1)
    linear = torch.einsum("ij,jhw->ihw", torch.linalg.inv(camera.to_camera), balanced).clamp(1e-8, 1)
    toned = linear ** (1 / 2.2)
    return 3 * toned**2 - 2 * toned**3


def _smoothed(noise: Tensor, luma: float, chroma: float) -> Tensor:
    """Noise in sRGB whose luma (ITU-R 601-2) and differences from it are smoothed by Gaussians of their own."""
    brightness = torch.einsum("i,ihw->hw", torch.tensor([0.299, 0.587, 0.114]), noise).unsqueeze(0)
    return _blurred(brightness, luma) + _blurred(noise - brightness, chroma)


def _blurred(planes: Tensor, sigma: float) -> Tensor:
    """(C, H, W) convolved with a Gaussian, zero outside."""
    reach = math.ceil(3 * sigma)
    if reach == 0:
        return planes
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).view(1, 1, 1, -1)
    planes = F.conv2d(planes.unsqueeze(1), taps, padding=(0, reach))
    return F.conv2d(planes, taps.transpose(2, 3), padding=(reach, 0)).squeeze(1)


def _mosaic(raw: Tensor) -> Tensor:
    """(3, H, W) with zeros where the Bayer pattern (RGGB) has another colour."""
    kept = torch.zeros_like(raw)
    kept[0, ::2, ::2] = raw[0, ::2, ::2]
    kept[1, ::2, 1::2] = raw[1, ::2, 1::2]
    kept[1, 1::2, ::2] = raw[1, 1::2, ::2]
    kept[2, 1::2, 1::2] = raw[2, 1::2, 1::2]
    return kept


def _demosaiced(mosaic: Tensor) -> Tensor:
    """Bilinear: what a pixel lacks is the weighted mean of its neighbours that have it."""
    weights = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).expand(3, 1, 3, 3).clone()
    weights[1, 0, ::2, ::2] = 0  # green has a neighbour on every side
    there = _mosaic(torch.ones_like(mosaic))
    sums = F.conv2d(torch.stack([mosaic, there]), weights, padding=1, groups=3)
    filled = sums[0] / sums[1]
    return torch.where(there > 0, mosaic, filled)
