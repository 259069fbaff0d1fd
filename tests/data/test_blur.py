"""Blur of moving cameras and of lenses, against direct convolution and geometry."""

import math

import pytest
import torch
from torch.nn import functional as F

from ipt_fast.data import blur


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_blurred_is_a_convolution_in_linear_light():
    image, kernel = torch.rand(3, 20, 24), torch.rand(5, 5)
    kernel /= kernel.sum()
    light = F.pad(image, [2] * 4, mode="replicate") ** 2.2
    expected = torch.zeros_like(image)
    for row in range(5):  # a convolution: the kernel is turned
        for column in range(5):
            expected += kernel[4 - row, 4 - column] * light[:, row : row + 20, column : column + 24]
    torch.testing.assert_close(blur.blurred(image, kernel), expected ** (1 / 2.2), rtol=1e-4, atol=1e-5)
    flat = torch.full((1, 9, 9), 0.3)
    torch.testing.assert_close(blur.blurred(flat, blur.disc_kernel(3.0)), flat)


def test_a_path_has_its_length_and_is_centred():
    for seed in range(20):
        path = blur.camera_path(17.0, generator(seed))
        steps = (path[1:] - path[:-1]).norm(dim=1)
        assert path.shape == (blur.STEPS, 2) and abs(steps.sum().item() - 17) < 1e-3
        assert (steps - steps.mean()).abs().max() < 1e-4  # of constant speed
        kernel = blur.path_kernel(path)
        places = torch.arange(len(kernel)) - len(kernel) // 2
        assert len(kernel) % 2 == 1 and abs(kernel.sum().item() - 1) < 1e-5 and kernel.min() >= 0
        assert abs((kernel.sum(0) @ places.float()).item()) < 1e-3  # the mean place is the middle
        assert abs((kernel.sum(1) @ places.float()).item()) < 1e-3
        assert len(kernel) <= 2 * 17 + 3
    straight = [torch.linalg.svdvals(p - p.mean(0)) for p in (blur.camera_path(17.0, generator(s)) for s in range(40))]
    ratios = [(values[1] / values[0]).item() for values in straight]
    assert min(ratios) < 0.02 and max(ratios) > 0.2  # calm hands and shaking ones


@pytest.mark.parametrize("radius", [0.4, 1.0, 2.5, 7.0])
def test_a_disc_has_its_radius(radius):
    disc = blur.disc_kernel(radius)
    assert len(disc) % 2 == 1 and abs(disc.sum().item() - 1) < 1e-5
    torch.testing.assert_close(disc, disc.T)
    if radius >= 1:
        assert abs(math.sqrt(1 / (math.pi * disc.max().item())) - radius) < 0.25  # the area of constant brightness


def test_the_views_of_a_dual_pixel_sensor():
    """A point of light moves to the left in one and to the right in the other; together they are the disc."""
    image = torch.zeros(3, 41, 41)
    image[:, 20, 20] = 1.0
    columns, sides = torch.arange(41.0), set()
    for seed in range(8):
        views = blur.dual_pixel_blur(image, generator(seed), (6.0, 6.0))
        left, right = views[:3] ** 2.2, views[3:] ** 2.2
        torch.testing.assert_close(left, right.flip(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close((left + right)[0] / 2, F.pad(blur.disc_kernel(6.0), [13] * 4), atol=1e-5, rtol=0)
        middle = (left[0].sum(0) @ columns / left[0].sum()).item() - 20
        assert 2 < abs(middle) < 3  # 4 r / (3 pi) of a half disc
        sides.add(middle > 0)
    assert sides == {True, False}  # before and behind the focal plane


@pytest.mark.parametrize("degrade", [blur.motion_blur, blur.defocus_blur, blur.dual_pixel_blur])
@pytest.mark.parametrize("shape", [(3, 32, 40), (1, 7, 5)])
def test_the_generator_alone_decides(degrade, shape):
    image = torch.rand(shape)
    first, again, other = (degrade(image, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape[1:] == image.shape[1:] and first.min() >= 0 and first.max() <= 1
    assert first.std() < image.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_blur_keeps_the_dtype(dtype):
    image = torch.rand(3, 12, 12).to(dtype)
    found = blur.motion_blur(image, generator())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), blur.motion_blur(image.float(), generator()), rtol=0.01, atol=0.005)


def test_what_cannot_be_blurred():
    with pytest.raises(TypeError, match="image must be floating point"):
        blur.blurred(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"image must be \(C, H, W\); got \(8, 8\)"):
        blur.blurred(torch.zeros(8, 8), torch.ones(1, 1))
