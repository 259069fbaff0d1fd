"""Pictures of local attribution maps, as figure 2 of the IPT-V2 paper has them."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from .embeddings import _coloured
from .figures import BACKGROUND, FAINT_INK, INK, MARGIN, MARK, to_picture

PANEL = 320  # width in pixels
DECADES = 3  # of attribution, from dark to bright
DIMMED = 0.6  # brightness of the image below an attribution


def draw_attributions(
    image: Tensor, maps: Sequence[tuple[str, Tensor, Tensor, tuple[int, int, int], float]]
) -> PIL.Image.Image:
    """One row for each model: its output with the window, the attribution, and both the image and the attribution.

    Brightness is logarithmic, as few pixels have most of an attribution: the darkest have a thousandth of the largest
    or less.

    Args:
        image: (C, H, W) floats in [0, 1], what the models got.
        maps: (title, output, attribution, window, diffusion index) of each model: the output (C', sH, sW), the
            attribution (H, W) of at least 0, the window (left, top, side) of the output in pixels.

    Raises:
        ValueError: no map.
    """
    if not maps:
        raise ValueError("maps must hold at least one; got none")
    height = max(1, round(PANEL * image.shape[1] / image.shape[2]))
    font, line = ImageFont.load_default(size=16), 28
    row = height + line + MARGIN
    canvas = PIL.Image.new("RGB", (MARGIN + 3 * (PANEL + MARGIN), MARGIN + len(maps) * row), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    ground = _gray(image)
    for i, (title, output, attribution, window, index) in enumerate(maps):
        share = (attribution / attribution.max()).double().cpu()
        bright = (1 + share.clamp(min=1e-12).log10() / DECADES).clamp(min=0)[..., None]
        heat = _coloured(2 * bright[..., 0].numpy() - 1)
        over = DIMMED * ground[..., None] * (1 - bright) + torch.tensor(MARK) / 255 * bright
        panels = [_rgb(output), heat, to_picture(over.numpy())]
        titles = [title, "Attribution", "on the input"]
        captions = ["", f"diffusion index {index:.2f}", ""]
        top = MARGIN + i * row
        for j, (pixels, name, caption) in enumerate(zip(panels, titles, captions, strict=True)):
            left = MARGIN + j * (PANEL + MARGIN)
            draw.text((left, top), name, INK, font)
            draw.text((left + font.getlength(name + "  "), top), caption, FAINT_INK, font)
            resized = PIL.Image.fromarray(pixels).resize((PANEL, height), PIL.Image.Resampling.BICUBIC)
            canvas.paste(resized, (left, top + line))
            factor = PANEL / output.shape[2]
            x, y, side = (factor * each for each in window)
            box = [left + x, top + line + y, left + x + side - 1, top + line + y + side - 1]
            draw.rectangle(box, outline=MARK if j == 0 else (255, 255, 255), width=2)
    return canvas


def _gray(image: Tensor) -> Tensor:
    """(H, W): the mean of up to three channels, in [0, 1]."""
    return image[:3].detach().float().cpu().mean(0).clamp(0, 1)


def _rgb(image: Tensor) -> np.ndarray:
    """(C, H, W) as (H, W, 3) uint8: three channels as they are, of any other number the mean."""
    image = image.detach().float().cpu()
    image = image if len(image) == 3 else _gray(image).expand(3, -1, -1)
    return to_picture(image.permute(1, 2, 0).numpy())
