"""Pictures for people: versions of one image side by side, with a zoomed crop of each."""

from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

PANEL_WIDTH = 480
MARGIN = 16
BACKGROUND, INK, FAINT_INK, MARK = (255, 255, 255), (24, 24, 24), (110, 110, 110), (255, 214, 10)


def side_by_side(
    panels: Iterable[tuple[str, np.ndarray]],
    *,
    captions: Sequence[str] | None = None,
    zoom: tuple[int, int, int, int] | None = None,
) -> PIL.Image.Image:
    """Panels in a row with their titles, and below each the same crop enlarged.

    Args:
        panels: (title, pixels) pairs, pixels (H, W), (H, W, 1) or (H, W, 3) uint8, all of one H and W.
        captions: a line for each panel, such as its PSNR; shown in gray after the title.
        zoom: (left, top, width, height) of the crop in pixels; :func:`detailed_box` of the last panel by default.

    Returns:
        An RGB picture with panels 480 pixels wide (up to 960 high), whatever the size of the images.

    Raises:
        ValueError: no panel, shapes that differ, another dtype, a caption too many or too few, or a zoom outside.
    """
    panels = [(title, _rgb(pixels)) for title, pixels in panels]
    if not panels:
        raise ValueError("panels must hold at least one (title, pixels) pair; got none")
    height, width = panels[0][1].shape[:2]
    if any(pixels.shape[:2] != (height, width) for _, pixels in panels):
        raise ValueError(f"panels must be of one size; got {[pixels.shape[:2] for _, pixels in panels]}")
    captions = [""] * len(panels) if captions is None else list(captions)
    if len(captions) != len(panels):
        raise ValueError(f"captions must be one for each of {len(panels)} panels; got {len(captions)}")
    left, top, box_width, box_height = zoom = detailed_box(panels[-1][1]) if zoom is None else zoom
    if min(zoom[:2]) < 0 or min(zoom[2:]) < 1 or left + box_width > width or top + box_height > height:
        raise ValueError(f"zoom must lie inside the {width} x {height} image; got {zoom}")

    scale = min(PANEL_WIDTH / width, 2 * PANEL_WIDTH / height)
    panel_size = (max(round(width * scale), 1), max(round(height * scale), 1))
    crop_size = (PANEL_WIDTH, max(round(PANEL_WIDTH * box_height / box_width), 1))
    font = ImageFont.load_default(size=18)
    line = 30
    canvas_width = MARGIN + len(panels) * (PANEL_WIDTH + MARGIN)
    canvas = PIL.Image.new("RGB", (canvas_width, line + panel_size[1] + crop_size[1] + 3 * MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, ((title, pixels), caption) in enumerate(zip(panels, captions, strict=True)):
        x, y = MARGIN + i * (PANEL_WIDTH + MARGIN), MARGIN + line
        draw.text((x, MARGIN), title, INK, font)
        draw.text((x + font.getlength(title + "  "), MARGIN), caption, FAINT_INK, font)
        image = PIL.Image.fromarray(pixels)
        inset = (PANEL_WIDTH - panel_size[0]) // 2
        canvas.paste(image.resize(panel_size, PIL.Image.Resampling.LANCZOS), (x + inset, y))
        box = [x + inset + left * scale, y + top * scale]
        draw.rectangle([*box, box[0] + box_width * scale - 1, box[1] + box_height * scale - 1], outline=MARK, width=2)
        crop = image.crop((left, top, left + box_width, top + box_height))
        y += panel_size[1] + MARGIN
        canvas.paste(crop.resize(crop_size, PIL.Image.Resampling.BICUBIC), (x, y))
        draw.rectangle([x, y, x + crop_size[0] - 1, y + crop_size[1] - 1], outline=MARK, width=2)
    return canvas


def image_grid(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> PIL.Image.Image:
    """Images in rows, from left to right and from the top down.

    Args:
        images: (H, W, 1 or 3) uint8 each, all of one H and W.
        columns: images of a row.
        gap: white pixels between images, and around them.

    Returns:
        An RGB picture; an image is as large as it is.

    Raises:
        ValueError: no image, sizes that differ, or another number of channels.
    """
    pixels = [_rgb(image) for image in images]
    if not pixels or columns < 1 or any(image.shape != pixels[0].shape for image in pixels):
        raise ValueError(f"images must be at least one, and of one size; got {[*{each.shape for each in pixels}]}")
    height, width = (side + gap for side in pixels[0].shape[:2])
    columns = min(columns, len(pixels))
    canvas = PIL.Image.new("RGB", (columns * width + gap, -(-len(pixels) // columns) * height + gap), BACKGROUND)
    for number, image in enumerate(pixels):
        row, column = divmod(number, columns)
        canvas.paste(PIL.Image.fromarray(image), (gap + column * width, gap + row * height))
    return canvas


def detailed_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the most detailed part: where the mean squared gradient is largest.

    The box is a quarter as wide as the image, at least 48 pixels, and three quarters as high as wide, where that fits.
    """
    gray = _rgb(pixels).mean(2)
    height, width = gray.shape
    box_width = min(width, max(width // 4, 48))
    box_height = min(height, max(3 * box_width // 4, 1))
    energy = np.zeros((height, width))
    energy[1:] += np.diff(gray, axis=0) ** 2
    energy[:, 1:] += np.diff(gray, axis=1) ** 2
    table = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums over all rectangles from the corner
    sums = table[box_height:] - table[:-box_height]
    sums = sums[:, box_width:] - sums[:, :-box_width]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(left), int(top), box_width, box_height


def to_picture(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8, uint16 or floats in [0, 1] -> uint8 to look at, clipped and rounded."""
    pixels = np.asarray(pixels)
    top = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
    return np.rint(255 * np.clip(pixels / np.float32(top), 0, 1)).astype(np.uint8)


def _rgb(pixels: np.ndarray) -> np.ndarray:
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ValueError(f"pixels must be (H, W[, 1 or 3]) uint8 and not empty; got {pixels.dtype} {pixels.shape}")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] not in (1, 3):
        raise ValueError(f"pixels must have 1 or 3 channels; got {pixels.shape[2]}")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
