"""Images of any kind as batches for a model, and a model's batches as images of the same kind."""

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


def as_batch(image: PIL.Image.Image | np.ndarray | Tensor) -> tuple[Tensor, Back]:
    """An image as (B, C, H, W) float32 in [0, 1], and the way back, which rounds and clips integers.

    Raises:
        TypeError: another kind or dtype.
        ValueError: another rank, or no pixels.
    """
    if isinstance(image, PIL.Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    raise TypeError(f"image must be a PIL image, a numpy array or a tensor; got {type(image).__name__}")


def magnified_alpha(alpha: np.ndarray | None, scale: int) -> np.ndarray | None:
    """An alpha channel (H, W), or None, for the image that a model returns: resized bicubically."""
    if alpha is None or scale == 1:
        return alpha
    larger = imresize(torch.from_numpy(alpha.astype(np.float64)), scale).round_()
    return larger.clamp_(0, np.iinfo(alpha.dtype).max).numpy().astype(alpha.dtype)


def _from_pil(image: PIL.Image.Image) -> tuple[Tensor, Back]:
    record = None if image.mode == "I;16" else io.from_pil(image)
    batch, back_to_array = _from_array(np.asarray(image) if record is None else record.pixels)

    def back(output: Tensor) -> PIL.Image.Image:
        pixels = back_to_array(output)
        if record is None:
            restored = PIL.Image.fromarray(pixels)
        else:
            scale = pixels.shape[0] // record.pixels.shape[0]
            restored = io.to_pil(io.Image(pixels, magnified_alpha(record.alpha, scale)))
        restored.info = {name: value for name, value in image.info.items() if name != "transparency"}
        return restored

    return batch, back


def _from_array(image: np.ndarray) -> tuple[Tensor, Back]:
    if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
        raise TypeError(f"image must be uint8, uint16 or floating point in [0, 1]; got {image.dtype}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"image must be (H, W) or (H, W, C) and not empty; got shape {image.shape}")
    top = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max
    channels_last = image.astype(np.float32).reshape(*image.shape[:2], -1)
    batch = torch.from_numpy(channels_last / np.float32(top)).permute(2, 0, 1)[None]

    def back(output: Tensor) -> np.ndarray:
        restored = output[0].permute(1, 2, 0).numpy()
        if top > 1:
            restored = np.clip(np.rint(restored * np.float32(top)), 0, top)
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
