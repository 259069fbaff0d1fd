"""Colours where alpha hides them: whatever a program left there would shine into what is visible."""

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ._image import Image

_HIDDEN = 2  # of 255: the largest alpha that counts as transparent


def fill_hidden(image: Image) -> Image:
    """``image`` with the colours of its transparent pixels taken from the visible pixels near them.

    Transparent is an alpha of at most 2 of 255, which shows a colour by less than a screen can: there programs leave
    colours as wrong as where it is 0. The nearer and the less transparent the visible pixels are the more they count.
    Their colours and all alpha are as they were, and so is an image without visible pixels, or whose further channel
    does not say what is visible.
    """
    if image.alpha is None or image.alpha_kind == "unspecified":
        return image
    top = int(np.iinfo(image.alpha.dtype).max)
    visible = image.alpha > top // 255 * _HIDDEN
    if visible.all() or not visible.any():
        return image
    weights = torch.from_numpy(np.where(visible, image.alpha, 0).astype(np.float32))[None, None] / top
    colours = torch.from_numpy(image.pixels.astype(np.float32)).permute(2, 0, 1)[None]
    filled = _filled(colours.mul_(weights), weights)[0].permute(1, 2, 0).round_().numpy()
    pixels = np.where(visible[:, :, None], image.pixels, filled.astype(image.pixels.dtype))
    return dataclasses.replace(image, pixels=pixels)


def _filled(sums: Tensor, weights: Tensor) -> Tensor:
    """Weighted colours (1, C, H, W) and their weights (1, 1, H, W) -> colours.

    Where the weight is 0 they come from the image of half the size, in which more pixels have a weight.
    """
    if (weights > 0).all():
        return sums / weights
    halved = [functional.avg_pool2d(each, 2, ceil_mode=True) for each in (sums, weights)]
    near = functional.interpolate(_filled(*halved), scale_factor=2, mode="bilinear")
    near = near[..., : sums.shape[2], : sums.shape[3]]
    return torch.where(weights > 0, sums / weights.clamp_min(torch.finfo(torch.float32).tiny), near)
