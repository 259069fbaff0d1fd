"""The protocols: what each rounds, clips, converts and leaves out."""

import numpy as np
import pytest

from ipt_fast.evaluation.metrics import ssim
from ipt_fast.evaluation.protocols import PROTOCOLS, get_protocol

SIZE = (24, 20)


def colour(seed=0):
    """An 8-bit colour image in [0, 1]."""
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3)) / 255


def disturbed(image, strength=0.1):
    return image + strength * (np.random.default_rng(1).random(image.shape) - 0.3)


def decibel(error):
    return 10 * np.log10(255**2 / np.mean(np.square(error)))


def test_rgb():
    target, output = colour(), disturbed(colour())
    expected = decibel(np.rint(255 * np.clip(output, 0, 1)) - 255 * target)
    assert get_protocol("rgb").score_output(output, target)[0] == pytest.approx(expected)


def test_ipt_y_is_the_luma_of_the_rounded_difference():
    target, output = colour(), disturbed(colour())
    difference = np.rint(255 * np.clip(output, 0, 1)) - 255 * target
    expected = decibel((65.738 * difference[..., 0] + 129.057 * difference[..., 1] + 25.064 * difference[..., 2]) / 256)
    assert get_protocol("ipt-y").score_output(output, target)[0] == pytest.approx(expected)


def bt601(image):
    return 16 + (65.481 * image[..., 0] + 128.553 * image[..., 1] + 24.966 * image[..., 2]) / 255


def test_basicsr_y_rounds_nothing():
    target, output = colour(), disturbed(colour())
    expected = decibel(bt601(255 * np.clip(output, 0, 1)) - bt601(255 * target))
    assert get_protocol("basicsr-y").score_output(output, target)[0] == pytest.approx(expected)


def test_matlab_y_rounds_the_output_and_the_luma():
    target, output = colour(), disturbed(colour())
    lumas = bt601(np.rint(255 * np.clip(output, 0, 1))), bt601(255 * target)
    expected = decibel(np.rint(lumas[0]) - np.rint(lumas[1]))
    assert get_protocol("matlab-y").score_output(output, target)[0] == pytest.approx(expected)


def test_dpdd_rounds_nothing_and_has_mae():
    target, output = colour(), disturbed(colour())
    clipped = np.clip(output, 0, 1)
    scores = get_protocol("dpdd").measure_output(output, target)
    assert scores["psnr"] == pytest.approx(decibel(255 * (clipped - target)))
    assert scores["mae"] == pytest.approx(np.abs(clipped - target).mean())
    assert scores["ssim"] == pytest.approx(ssim(clipped, target, data_range=1, window="uniform"))
    assert scores["ssim"] != pytest.approx(ssim(clipped, target, data_range=1), abs=1e-4)
    assert get_protocol("dpdd").measure_input(output, target)["mae"] == pytest.approx(np.abs(output - target).mean())
    assert "mae" not in get_protocol("rgb").measure_output(output, target)


def test_they_differ():
    target, output = colour(), disturbed(colour(), strength=0.02)
    scores = {protocol.score_output(output, target)[0] for protocol in PROTOCOLS.values()}
    assert len({round(score, 4) for score in scores}) == len(PROTOCOLS) == 5


@pytest.mark.parametrize("name", PROTOCOLS)
def test_gray_scores_as_three_equal_channels(name):
    target = colour()[..., 0]
    output = disturbed(target)
    protocol, as_colour = get_protocol(name), [np.repeat(each[..., None], 3, 2) for each in (output, target)]
    for score in (protocol.score_output, protocol.score_input):
        for axes in (..., (..., None)):
            assert score(output[axes], target[axes]) == pytest.approx(score(*as_colour), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.endswith("y")])
def test_gray_and_the_same_saved_as_colour_are_compared(name):
    target = colour()[..., :1]
    output = disturbed(target)
    protocol, as_colour = get_protocol(name), [each.repeat(3, axis=2) for each in (output, target)]
    for score in (protocol.score_output, protocol.score_input):
        for pair in ((output, as_colour[1]), (as_colour[0], target)):
            assert score(*pair) == pytest.approx(score(*as_colour), rel=1e-12)
    for other in ("rgb", "dpdd"):
        with pytest.raises(ValueError, match=r"same shape; got .*1\) and .*3\)"):
            get_protocol(other).score_output(output, as_colour[1])


def test_luma_of_gray_by_hand():
    target = np.full(SIZE, 100 / 255)
    output = np.full(SIZE, 110 / 255)
    weight = (65.481 + 128.553 + 24.966) / 255
    assert get_protocol("basicsr-y").score_output(output, target)[0] == pytest.approx(decibel(10 * weight))
    assert get_protocol("rgb").score_output(output, target)[0] == pytest.approx(decibel(10))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_crop_leaves_the_border_out(name):
    target, output = colour(), disturbed(colour())
    protocol = get_protocol(name)
    inner = (slice(4, -4), slice(4, -4))
    expected = protocol.score_output(output[inner], target[inner])
    damaged = output.copy()
    damaged[:4], damaged[:, -4:] = 1, 0
    assert protocol.score_output(damaged, target, crop=4) == pytest.approx(expected)
    with pytest.raises(ValueError, match="crop must be at least 0 and leave some"):
        protocol.score_output(output, target, crop=10)


def test_only_an_output_is_clipped_and_rounded():
    target = colour()
    beyond = disturbed(target, strength=1.0)
    protocol = get_protocol("rgb")
    assert protocol.score_input(beyond, target)[0] == pytest.approx(decibel(255 * beyond - 255 * target))
    assert protocol.score_output(beyond, target)[0] > protocol.score_input(beyond, target)[0] + 0.1


@pytest.mark.parametrize("name", PROTOCOLS)
def test_noise(name):
    """Restormer's noise: numpy's legacy generator, seed 0 for each image, added in [0, 1]; clipped for IPT alone."""
    image = np.float32(colour())
    protocol = get_protocol(name)
    np.random.seed(seed=0)
    expected = (image + np.random.normal(0, 50 / 255.0, image.shape)).astype(np.float32)
    if name == "ipt-y":
        expected = expected.clip(0, 1)
    for _ in range(2):
        noisy = protocol.add_noise(image, 50)
        assert noisy.dtype == np.float32
        assert (noisy == expected).all()
    assert (noisy.min() < 0) == (name != "ipt-y")


def test_noise_does_not_touch_the_global_generator():
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    get_protocol("rgb").add_noise(colour(), 25)
    assert np.random.random() == expected


def test_psnr_of_noise_is_its_level():
    """sigma 25 is 20 log10(255 / 25) = 20.17 dB."""
    image = np.full((256, 256, 3), 0.5, dtype=np.float32)
    protocol = get_protocol("rgb")
    assert protocol.score_input(protocol.add_noise(image, 25), image)[0] == pytest.approx(20.17, abs=0.03)


def test_bad_input():
    with pytest.raises(ValueError, match="one of rgb, ipt-y, basicsr-y, matlab-y, dpdd; got 'y'"):
        get_protocol("y")
    with pytest.raises(ValueError, match="sigma must be finite and at least 0; got -1"):
        get_protocol("rgb").add_noise(colour(), -1)
    with pytest.raises(ValueError, match="same shape"):
        get_protocol("rgb").score_output(colour()[1:], colour())
    with pytest.raises(ValueError, match="NaN"):
        get_protocol("rgb").score_output(colour() * np.nan, colour())
