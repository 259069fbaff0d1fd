"""Colours that alpha hides do not shine into what is visible."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from ipt_fast.cli import main
from ipt_fast.data.io import Image, fill_hidden, read_image, write_image
from ipt_fast.inference import restore
from ipt_fast.models.contract import Contract

SIZE = 48


class Blur(nn.Module):
    """The mean over 5 x 5 pixels, which reaches from hidden into visible ones; enlarges where ``scale`` is 2."""

    def __init__(self, scale=1):
        super().__init__()
        self.contract, self.factor = Contract(scale=lambda task: scale), scale

    def forward(self, x):
        x = nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
        return nn.functional.interpolate(nn.functional.avg_pool2d(x, 5, 1), scale_factor=self.factor)


def disc():
    y, x = np.mgrid[:SIZE, :SIZE]
    return (y - 24) ** 2 + (x - 24) ** 2 < 17**2


def sprite(hidden, channels=3, dtype=np.uint8):
    """A bright disc with a soft gradient; around it ``hidden`` where nothing is visible."""
    top = np.iinfo(dtype).max
    gradient = np.linspace(0.6, 0.9, SIZE)[None, :, None] * np.ones((SIZE, SIZE, channels))
    pixels = np.where(disc()[:, :, None], gradient, hidden) * top
    return Image(pixels.astype(dtype), (disc() * top).astype(dtype))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_colours_come_from_visible_neighbours(channels, dtype):
    top = np.iinfo(dtype).max
    black, white = (fill_hidden(sprite(hidden, channels, dtype)) for hidden in (0, 1))
    np.testing.assert_array_equal(black.pixels, white.pixels)  # of what was hidden nothing is left
    image = sprite(0, channels, dtype)
    np.testing.assert_array_equal(black.alpha, image.alpha)
    np.testing.assert_array_equal(black.pixels[disc()], image.pixels[disc()])
    gradient = np.linspace(0.6, 0.9, SIZE) * top
    near = (~disc()) & (np.hypot(*(np.mgrid[:SIZE, :SIZE] - 24)) < 20)
    assert np.abs(black.pixels - gradient[None, :, None])[near].max() < 0.06 * top
    assert 0.55 * top < black.pixels.min() and black.pixels.max() < 0.95 * top


def test_nothing_else_is_changed():
    image = sprite(0)
    for other in (Image(image.pixels), Image(image.pixels, np.zeros_like(image.alpha)),
                  Image(image.pixels, np.ones_like(image.alpha)),
                  Image(image.pixels, image.alpha, alpha_kind="unspecified")):  # fmt: skip
        assert fill_hidden(other) is other
    one = Image(np.full((1, 3, 1), 9, np.uint8), np.array([[0, 255, 0]], np.uint8))
    np.testing.assert_array_equal(fill_hidden(one).pixels, one.pixels)


def test_faint_pixels_count_little():
    pixels = np.full((1, 3, 1), 0, np.uint8)
    pixels[0, :, 0] = 250, 77, 10
    image = Image(pixels, np.array([[255, 0, 3]], np.uint8))
    assert fill_hidden(image).pixels[0, 1, 0] > 150
    np.testing.assert_array_equal(fill_hidden(image).pixels[0, ::2], pixels[0, ::2])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_nearly_hidden_colours_are_junk_too(alpha, dtype):
    """Alpha up to 2 of 255 counts as hidden, 3 as visible."""
    image = sprite(0, dtype=dtype)
    step = np.iinfo(dtype).max // 255
    faint = Image(image.pixels, np.where(disc(), image.alpha, alpha * step).astype(dtype))
    filled = fill_hidden(faint)
    np.testing.assert_array_equal(filled.alpha, faint.alpha)
    np.testing.assert_array_equal(filled.pixels[disc()], image.pixels[disc()])
    assert (filled.pixels[~disc()].min() > 0.5 * np.iinfo(dtype).max) == (alpha < 3)


def shown(image, background=0.75):
    channels = np.asarray(image.convert("RGBA")) / 255
    return channels[:, :, :3] * channels[:, :, 3:] + background * (1 - channels[:, :, 3:])


def as_palette(image):
    """The sprite as a palette with one transparent entry, black or white."""
    colour = int(image.pixels[0, 0, 0])
    grays = image.pixels[:, :, 0].astype(np.uint8)
    grays = np.where(disc(), np.clip(grays, 1, 254), colour).astype(np.uint8)
    palette = PIL.Image.fromarray(grays).convert("P")
    palette.putpalette([level for gray in range(256) for level in (gray, gray, gray)])
    palette.info["transparency"] = colour
    return palette


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_no_fringes_at_the_edge_of_a_sprite(kind, scale):
    results = []
    for hidden in (0, 1):
        image = PIL.Image.fromarray(np.dstack([sprite(hidden).pixels, sprite(hidden).alpha]))
        image = as_palette(sprite(hidden)) if kind == "P" else image.convert(kind)
        result = restore(image, Blur(scale))
        assert result.size == (SIZE * scale, SIZE * scale)
        results.append(shown(result))
        if scale == 1:
            np.testing.assert_array_equal(np.asarray(result.convert("RGBA"))[:, :, 3], 255 * disc())
    np.testing.assert_array_equal(*results)
    bare = shown(restore(PIL.Image.fromarray(sprite(0.75).pixels), Blur(scale)))
    alpha = np.asarray(result.convert("RGBA"))[:, :, 3:] / 255
    assert np.abs((results[0] - bare) * alpha).max() < 0.08  # black ones were 101 / 255 off


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_the_command_line_fills_too(tmp_path, suffix):
    torch.manual_seed(0)
    outputs = []
    for hidden in (0, 1):
        write_image(tmp_path / f"{hidden}{suffix}", sprite(hidden))
        assert main(["restore", str(tmp_path / f"{hidden}{suffix}"), str(tmp_path / "out" / f"{hidden}{suffix}")]) == 0
        outputs.append(read_image(tmp_path / "out" / f"{hidden}{suffix}"))
    np.testing.assert_array_equal(outputs[0].pixels, outputs[1].pixels)
    np.testing.assert_array_equal(outputs[0].alpha, sprite(0).alpha)
