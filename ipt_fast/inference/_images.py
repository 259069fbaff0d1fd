"""Images of any kind as batches for a model, and a model's batches as images of the same kind."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..data import io
from ..data.resize import imresize

ImageT = TypeVar("ImageT", PIL.Image.Image, np.ndarray, Tensor)
Back = Callable[[Tensor], Any]  # from a restored batch to an image of the kind that was given

# Gaussian noise of a level of 255, five times the strongest in the field's tables, stays inside [-8, 8] on an image in
# [0, 1], and takes no mean above 2. Images in 0..255 go beyond that, unless they are black.
LARGEST_VALUE = 8.0
LARGEST_MEAN = 2.0
# Noise takes no mean below this, but for that of few values; images in [-1, 1] that are dark have one below it.
SMALLEST_MEAN = -0.25


def as_batch(image: PIL.Image.Image | np.ndarray | Tensor) -> tuple[Tensor, Back]:
    """An image as (B, C, H, W) float32 in [0, 1], and the way back, which rounds and clips integers.

    Raises:
        TypeError: another kind or dtype.
        ValueError: another rank, no pixels, NaN or infinity, or values that no noise takes out of [0, 1].
    """
    if isinstance(image, PIL.Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        batch, back = _from_array(image)
    elif isinstance(image, Tensor):
        batch, back = _from_tensor(image)
    else:
        raise TypeError(f"image must be a PIL image, a numpy array or a tensor; got {type(image).__name__}")
    _check_range(batch)
    return batch, back


def magnified_alpha(alpha: np.ndarray | None, scale: int) -> np.ndarray | None:
    """An alpha channel (H, W), or None, for the image that a model returns: resized bicubically."""
    if alpha is None or scale == 1:
        return alpha
    larger = imresize(torch.from_numpy(alpha.astype(np.float64)), scale).round_()
    return larger.clamp_(0, np.iinfo(alpha.dtype).max).numpy().astype(alpha.dtype)


def _check_range(batch: Tensor) -> None:
    if not batch.numel():
        return
    low, high = (float(value) for value in batch.aminmax())  # NaN where one is in the batch
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("image must be finite; got NaN or infinity")
    values = batch[0].numel()
    too_bright = high > LARGEST_MEAN and batch.flatten(1).mean(1).max() > LARGEST_MEAN
    # The mean of as many values of that noise strays by their root; five times as far it does not.
    too_dark = low < SMALLEST_MEAN and batch.flatten(1).mean(1).min() < SMALLEST_MEAN - 5 / values**0.5
    if max(-low, high) > LARGEST_VALUE or too_bright or too_dark:
        raise ValueError(f"image must be in [0, 1], but for noise, where it is floats; got {low:g} to {high:g}")


def _from_pil(image: PIL.Image.Image) -> tuple[Tensor, Back]:
    if image.mode == "I;16":
        if "transparency" in image.info:
            raise ValueError("image must have no transparent colour in mode I;16, which has no alpha; got one")
        record = io.Image(np.asarray(image))
    else:
        record = io.fill_hidden(io.from_pil(image))
    batch, back_to_array = _from_array(record.pixels)
    # What cannot be kept is known before the work, which must not be lost to it.
    _, dropped = io.info_of_pil(image, image.width, image.height)
    if dropped:
        warnings.warn(f"not kept in the result: {', '.join(dropped)}", stacklevel=2)

    def back(output: Tensor) -> PIL.Image.Image:
        pixels = back_to_array(output)
        if record.pixels.ndim == 2:
            restored = PIL.Image.fromarray(pixels)
        else:
            scale = pixels.shape[0] // record.pixels.shape[0]
            restored = io.to_pil(io.Image(pixels, magnified_alpha(record.alpha, scale)))
        restored.info, _ = io.info_of_pil(image, restored.width, restored.height)
        return restored

    return batch, back


def _from_array(image: np.ndarray) -> tuple[Tensor, Back]:
    if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
        raise TypeError(f"image must be uint8, uint16 or floating point in [0, 1]; got {image.dtype}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"image must be (H, W) or (H, W, C) and not empty; got shape {image.shape}")
    top = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max
    # In place here and on the way back: of a scan each copy in float32 is gigabytes.
    channels_last = image.astype(np.float32).reshape(*image.shape[:2], -1)
    channels_last /= np.float32(top)
    batch = torch.from_numpy(channels_last).permute(2, 0, 1)[None]

    def back(output: Tensor) -> np.ndarray:
        restored = output[0].permute(1, 2, 0).numpy()
        if top > 1:
            restored *= np.float32(top)
            np.rint(restored, out=restored)
            np.clip(restored, 0, top, out=restored)
        if image.ndim == 2 and restored.shape[2] == 1:
            restored = restored[:, :, 0]
        return restored.astype(image.dtype)

    return batch, back


def _from_tensor(image: Tensor) -> tuple[Tensor, Back]:
    if not image.is_floating_point():
        raise TypeError(f"image must be a floating-point tensor in [0, 1]; got {image.dtype}")
    if image.dim() != 4 or 0 in image.shape[1:]:
        raise ValueError(f"image must be (B, C, H, W) with C, H and W at least 1; got {tuple(image.shape)}")
    return image.detach().float(), lambda output: output.to(image.dtype)
