"""Noise of a camera: what it depends on, how it is correlated, and what stays as it is."""

import dataclasses

import pytest
import torch

from ipt_fast.data.camera import Camera, camera_noise, jpeg, random_camera

PLAIN = Camera(torch.eye(3), torch.tensor([2.0, 1.0, 1.6]), 2e-3, 1e-5, (0.0, 0.0), None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlation(first, second):
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


def test_a_camera_without_noise_changes_nothing():
    image = torch.rand(3, 20, 31, generator=generator(1))
    quiet = dataclasses.replace(PLAIN, shot_noise=0.0, read_noise=0.0)
    assert torch.equal(camera_noise(image, generator(), quiet), image)


def test_equal_generators_give_equal_photos_and_the_image_is_left():
    image = torch.rand(3, 33, 24, generator=generator(1))
    before = image.clone()
    first, second, other = (camera_noise(image, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other) and torch.equal(image, before)
    assert first.min() >= 0 and first.max() <= 1 and torch.equal((first * 255).round() / 255, first)


def test_shot_noise_grows_with_the_light_as_the_formula_says():
    """Where green is measured and not interpolated, developed linearly, the variance is a x + b."""
    linear = dataclasses.replace(PLAIN, gains=torch.ones(3), read_noise=1e-4)
    for level in (0.2, 0.5):
        noise = camera_noise(torch.full((3, 256, 256), level), generator(), linear) - level
        toned = 0.5 - torch.sin(torch.asin(torch.tensor(1 - 2 * level)) / 3)
        raw = toned**2.2
        slope = (6 * toned - 6 * toned**2) * toned / (2.2 * raw)  # of tone curve and gamma
        expected = (2e-3 * raw + 1e-4).sqrt() * slope
        measured = noise[1, ::2, 1::2].std()
        assert measured.item() == pytest.approx(expected.item(), rel=0.03)


def test_demosaicing_correlates_neighbours_and_smoothing_more_so():
    gray = torch.full((3, 128, 128), 0.4)
    sharp = camera_noise(gray, generator(), PLAIN) - gray
    soft = camera_noise(gray, generator(), dataclasses.replace(PLAIN, smoothing=(0.5, 3.0))) - gray
    assert 0.3 < correlation(sharp[0, :, 1:], sharp[0, :, :-1]) < 0.7
    assert abs(correlation(sharp[0], sharp[2])) < 0.1
    assert correlation(soft[0, :, 4:] - soft[1, :, 4:], soft[0, :, :-4] - soft[1, :, :-4]) > 0.4
    assert correlation(soft[0], soft[1]) > 0.5


def test_drawn_cameras_keep_white_and_stay_in_the_published_ranges():
    for seed in range(20):
        camera = random_camera(generator(seed))
        torch.testing.assert_close(camera.to_camera.sum(1), torch.ones(3))
        assert 1e-4 <= camera.shot_noise <= 0.012 and camera.read_noise > 0 and 60 <= camera.quality <= 100


def test_jpeg_is_that_of_pillow_for_gray_and_colour():
    for channels in (1, 3):
        image = torch.rand(channels, 24, 17, generator=generator())
        fine, coarse = jpeg(image, 100), jpeg(image, 10)
        assert fine.shape == image.shape and (fine - image).abs().mean() < (coarse - image).abs().mean()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError, "image must be floating point in"),
        (torch.zeros(1, 8, 8), ValueError, r"image must be \(3, H, W\)"),
        (torch.zeros(3, 1, 8), ValueError, r"image must be \(3, H, W\)"),
    ],
)
def test_bad_images_are_named(image, error, message):
    with pytest.raises(error, match=message):
        camera_noise(image, generator())
