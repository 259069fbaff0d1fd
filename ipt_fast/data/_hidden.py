"""Colours where alpha hides them: whatever a program left there would shine into what is visible."""

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ._image import Image


def fill_hidden(image: Image) -> Image:
    """``image`` with the colours of its fully transparent pixels taken from the visible pixels near them.

    The nearer and the less transparent those are the more they count. Visible pixels and alpha are as they were, and so
    is an image without visible pixels, or whose further channel does not say what is visible.
    """
    if image.alpha is None or image.alpha_kind == "unspecified" or image.alpha.all() or not image.alpha.any():
        return image
    weights = torch.from_numpy(image.alpha.astype(np.float32))[None, None] / np.iinfo(image.alpha.dtype).max
    colours = torch.from_numpy(image.pixels.astype(np.float32)).permute(2, 0, 1)[None]
    filled = _filled(colours.mul_(weights), weights)[0].permute(1, 2, 0).round_().numpy()
    pixels = np.where(image.alpha[:, :, None] > 0, image.pixels, filled.astype(image.pixels.dtype))
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
