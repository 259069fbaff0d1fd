import pytest
import torch

from ipt_fast.data.degradations import add_gaussian_noise, random_sigma


def test_noise_has_the_asked_standard_deviation_and_is_not_clipped():
    image = torch.full((3, 128, 128), 0.98)
    noisy = add_gaussian_noise(image, 25, torch.Generator().manual_seed(0))
    noise = noisy - image
    assert noisy.shape == image.shape and noisy.dtype == image.dtype
    assert abs(noise.std().item() * 255 - 25) < 0.5 and abs(noise.mean().item() * 255) < 0.5
    assert noisy.max() > 1.05


def test_the_generator_alone_decides_the_noise():
    image = torch.zeros(1, 8, 8)
    first, again, other = (add_gaussian_noise(image, 10, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sigma_zero_changes_nothing():
    image = torch.rand(3, 4, 4)
    assert torch.equal(add_gaussian_noise(image, 0, torch.Generator()), image)


@pytest.mark.parametrize("sigma", [-1, float("nan"), float("inf")])
def test_bad_sigma(sigma):
    with pytest.raises(ValueError, match="sigma"):
        add_gaussian_noise(torch.zeros(1, 2, 2), sigma, torch.Generator())


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        add_gaussian_noise(torch.zeros(1, 2, 2, dtype=torch.uint8), 5, torch.Generator())


def test_random_sigma_fills_its_range():
    generator = torch.Generator().manual_seed(0)
    drawn = [random_sigma(5, 50, generator) for _ in range(500)]
    assert 5 <= min(drawn) < 7 and 48 < max(drawn) <= 50
