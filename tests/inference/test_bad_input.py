"""What restore() refuses: images, arguments, and models whose output does not fit."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast.inference import restore


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_images_are_refused(bad):
    image = np.zeros((5, 5, 3), np.float32)
    image[2, 3, 1] = bad
    with pytest.raises(ValueError, match="image must be finite; got NaN or infinity"):
        restore(image, nn.Identity())
    with pytest.raises(ValueError, match="image must be finite; got NaN or infinity"):
        restore(torch.from_numpy(image)[None], nn.Identity())


def pictures(dtype):
    """A bright, a dark and a nearly black one in 0..255, a constant one, one in -128..127, and two below 0."""
    values = np.random.default_rng(0).random((3, 40, 40))
    return [each.astype(dtype) for each in (255 * values, 255 * values**8, 12 * values, 0 * values + 3,
                                                255 * values - 128, values * [[[255]], [[1]], [[1]]],
                                                2 * values**3 - 1, 0 * values - 7)]  # fmt: skip


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_that_are_not_in_0_to_1_are_refused(index, dtype):
    image = pictures(dtype)[index]
    said = r"image must be in \[0, 1\], but for noise, where it is floats; got "
    with pytest.raises(ValueError, match=said):
        restore(image.transpose(1, 2, 0), nn.Identity())
    with pytest.raises(ValueError, match=said):
        restore(torch.from_numpy(image)[None], nn.Identity())
    with pytest.raises(ValueError, match=said):  # one of a batch
        restore(torch.from_numpy(np.stack([image * 0, image])), nn.Identity())


@pytest.mark.parametrize("sigma", [15, 50, 100, 200])
def test_floats_with_noise_are_not_refused(sigma):
    random = np.random.default_rng(0)
    for white in (np.zeros((300, 300, 3)), np.ones((300, 300, 3)), np.ones((1, 1)), random.random((300, 300))):
        noisy = (white + random.normal(0, sigma / 255, white.shape)).astype(np.float32)
        assert sigma < 50 or white.size == 1 or noisy.max() > 1.4 or white.max() == 0
        np.testing.assert_array_equal(restore(noisy, nn.Identity()), noisy)


@pytest.mark.parametrize("side", [1, 2, 5, 20])
def test_small_dark_images_with_the_strongest_noise_are_not_refused(side):
    random = np.random.default_rng(0)
    for _ in range(200):
        noisy = np.minimum(random.normal(0, 1, (side, side)), 2).astype(np.float32)
        np.testing.assert_array_equal(restore(noisy, nn.Identity()), noisy)


def test_transparent_colour_of_sixteen_bits_is_refused():
    image = PIL.Image.fromarray(np.zeros((4, 4), np.uint16))
    image.info["transparency"] = 0
    with pytest.raises(ValueError, match="image must have no transparent colour in mode I;16"):
        restore(image, nn.Identity())


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.int32),
        np.zeros((4, 4), bool),
        np.zeros((4, 4), complex),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        [[0.0]],
        None,
    ],
)
def test_wrong_kinds_are_type_errors(image):
    with pytest.raises(TypeError, match="image must be"):
        restore(image, nn.Identity())


@pytest.mark.parametrize(
    "image",
    [np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8), np.zeros((4, 4, 0), np.uint8), np.zeros((1, 4, 4, 3), np.uint8),
     torch.zeros(3, 4, 4), torch.zeros(1, 0, 4, 4), torch.zeros(1, 3, 0, 4)],
)  # fmt: skip
def test_wrong_shapes_are_value_errors(image):
    with pytest.raises(ValueError, match="image must be"):
        restore(image, nn.Identity())


def test_wrong_channels_and_modes():
    tiny = ipt_fast.create_model("ipt_v2_tiny").eval()
    with pytest.raises(ValueError, match="must have 3 channels for this model; got 4"):
        restore(np.zeros((4, 4, 4), np.uint8), tiny)
    with pytest.raises(ValueError, match="mode must be .*; got CMYK"):
        restore(PIL.Image.new("CMYK", (4, 4)), tiny)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tile": 15}, 'tile must be "auto", None or an int of at least 16; got 15'),
        ({"tile": "whole"}, "tile must be"),
        ({"tile": 64.0}, "tile must be"),
        ({"tile": True}, "tile must be"),
        ({"overlap": -1}, "overlap must be"),
        ({"overlap": 1.5}, "overlap must be"),
        ({"tile": 64, "overlap": 33}, "overlap must be at most half of the tile, 32; got 33"),
        ({"blend": "linear"}, "blend must be one of cosine, average; got 'linear'"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"dtype": None}, "dtype must be"),
        ({"device": "nowhere"}, "device must be usable; got nowhere"),
        ({"device": "cuda:99"}, "device must be usable; got cuda:99"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        restore(np.zeros((4, 4), np.uint8), nn.Identity(), **arguments)


def test_model_that_changes_the_size_is_refused():
    with pytest.raises(ValueError, match=r"model must return \(B, C, H, W\) of the input's size; got \(1, 1, 8, 8\)"):
        restore(np.zeros((4, 4), np.uint8), nn.Upsample(scale_factor=2))
