import math

import pytest
import torch

from ipt_fast.data import blur, camera
from ipt_fast.data.degradations import (
    DEGRADATIONS,
    add_alike_noise,
    add_gaussian_noise,
    add_rain,
    degrade,
    find_task,
    imresize,
    random_rain,
    random_sigma,
    target_of,
    task_names,
)
from ipt_fast.data.resize import shrink


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


def test_imresize_has_matlabs_weights():
    """Those that halving by MATLAB's antialiased bicubic kernel is known for, inside and, reflected, at the border."""
    weights = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=torch.float64) / 256
    for position in range(16):
        impulse = torch.zeros(16, dtype=torch.float64)
        impulse[position] = 1
        expected = torch.zeros(8, dtype=torch.float64)
        for i in range(8):
            for tap in range(8):
                at = 2 * i - 3 + tap
                at = -1 - at if at < 0 else 31 - at if at > 15 else at
                expected[i] += weights[tap] * (at == position)
        got = imresize(impulse.expand(4, 16), 0.5)
        torch.testing.assert_close(got, expected.expand(2, 8))


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4, 0.7])
def test_imresize_by_the_formula(scale):
    """MATLAB's contributions, one output at a time."""

    def cubic(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    def along_columns(rows):
        size, stretch = len(rows), min(scale, 1.0)
        result = []
        for out in range(1, math.ceil(round(size * scale, 9)) + 1):
            centre = out / scale + 0.5 * (1 - 1 / scale)
            left = math.floor(centre - 2 / stretch)
            taps = range(left, left + math.ceil(4 / stretch) + 2)
            weights = [stretch * cubic(stretch * (centre - tap)) for tap in taps]
            places = [(tap - 1) % (2 * size) for tap in taps]
            places = [place if place < size else 2 * size - 1 - place for place in places]
            total = sum(w * rows[place] for w, place in zip(weights, places, strict=True))
            result.append(total / sum(weights))
        return torch.stack(result)

    image = torch.rand(13, 12, dtype=torch.float64)
    expected = along_columns(along_columns(image).T).T
    torch.testing.assert_close(imresize(image, scale), expected)
    channels = imresize(image.expand(2, 3, 13, 12).float(), scale)
    torch.testing.assert_close(channels, expected.float().expand(2, 3, *expected.shape))


def test_imresize_keeps_constants_and_refuses_bad_input():
    torch.testing.assert_close(imresize(torch.full((3, 7, 9), 0.3), 1 / 3), torch.full((3, 3, 3), 0.3))
    for scale in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            imresize(torch.rand(4, 4), scale)
    with pytest.raises(ValueError, match="image must be"):
        imresize(torch.rand(3, 0, 4), 0.5)
    with pytest.raises(TypeError, match="image must be floating point"):
        imresize(torch.zeros(4, 4, dtype=torch.uint8), 0.5)


def rain(seed=0, **changed):
    arguments = dict(density=0.2, length=15, angle=20, width=1.5, brightness=0.5)
    image = torch.full((3, 96, 96), 0.2)
    return add_rain(image, torch.Generator().manual_seed(seed), **{**arguments, **changed}) - image


def test_rain_is_bright_gray_and_of_the_asked_density():
    streaks = rain()
    assert streaks.min() >= 0 and 0.3 < streaks.max() <= 0.5 + 1e-6
    assert torch.equal(streaks[0], streaks[2])
    assert torch.equal(rain(seed=1), rain(seed=1)) and not torch.equal(rain(seed=1), streaks)
    shares = [(rain(density=density)[0] > 0).float().mean().item() for density in (0, 0.05, 0.2)]
    assert shares[0] == 0 and 0.02 < shares[1] < 0.12 and 0.12 < shares[2] < 0.4
    assert add_rain(torch.ones(1, 9, 9), torch.Generator(), density=1, length=3, angle=0).max() == 1


@pytest.mark.parametrize("angle", [-60, -20, 0, 35, 90])
def test_rain_falls_in_the_asked_direction(angle):
    """Pixels along the streaks are alike, those across are not."""
    streaks = rain(angle=angle, length=25)[0]
    radians = math.radians(angle)
    step = round(6 * math.cos(radians)), round(-6 * math.sin(radians))

    def likeness(down, right):
        other = streaks.roll((down, right), (0, 1))
        return torch.corrcoef(torch.stack([streaks[12:-12, 12:-12].flatten(), other[12:-12, 12:-12].flatten()]))[0, 1]

    assert likeness(*step) > 0.4 > 0.2 > likeness(step[1], -step[0])


@pytest.mark.parametrize(
    "wrong", [{"density": 1.1}, {"length": 0}, {"angle": 91}, {"width": 0}, {"brightness": -1}, {"angle": float("nan")}]
)
def test_bad_rain(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be in"):
        rain(**wrong)


def test_degradations_of_the_tasks():
    image = torch.rand(3, 24, 24)

    def of(task, seed=0):
        return degrade(image, task, torch.Generator().manual_seed(seed), sigma=(20, 20))

    assert torch.equal(of("sr_x3"), imresize(image, 1 / 3).clamp(0, 1))
    for task, sigma in (("denoise30", 30), ("denoise50", 50), ("denoise", 20)):
        assert abs((of(task) - image).std().item() * 255 - sigma) < 0.1 * sigma
    assert torch.equal(of("derain"), random_rain(image, torch.Generator().manual_seed(0)))
    assert not torch.equal(of("derain"), of("derain", seed=1))
    for task, same in (("motion_deblur", blur.motion_blur), ("defocus_deblur", blur.defocus_blur),
                       ("dual_pixel_deblur", blur.dual_pixel_blur), ("camera", camera.camera_noise)):  # fmt: skip
        assert torch.equal(of(task), same(image, torch.Generator().manual_seed(0)))
    assert torch.equal(of("jpeg30"), camera.jpeg(image, 30))
    errors = {(of("jpeg", seed) - image).abs().mean().item() for seed in range(5)}
    assert len(errors) > 2 and max(errors) < 0.3


def test_tasks_by_name():
    assert find_task("sr_x3").scale == 3 and find_task("derain").scale == find_task("jpeg40").scale == 1
    assert find_task("denoise").draws_sigma and not find_task("denoise25").draws_sigma
    for task in ("", "sr_x", "derain2", "dehaze", "denoise-5", "xdenoise"):
        with pytest.raises(ValueError, match=r"task must be sr_x<n>, derain, denoise\[<σ>\], .* or jpeg\[<quality>\]"):
            find_task(task)
    for task, limits in (("sr_x0", "1, 16"), ("jpeg101", "1, 100"), ("denoise256", "0, 255")):
        with pytest.raises(ValueError, match=rf"with a number in \[{limits}\]; got '{task}'"):
            find_task(task)
    assert all(kind in task_names() for kind in DEGRADATIONS)


@pytest.mark.parametrize("task", [kind + ("4" if kind == "sr_x" else "") for kind in DEGRADATIONS])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_degradation_is_a_function_of_image_and_generator(task, channels):
    image = torch.rand(channels, 36, 44)
    before = image.clone()
    first, again, other = (degrade(image, task, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again) and torch.equal(image, before)
    assert torch.equal(first, other) == (task == "sr_x4")
    found = find_task(task)
    assert first.shape == (found.degradation.views * channels, 36 // found.scale, 44 // found.scale)
    assert first.dtype == torch.float32 and first.isfinite().all()


def test_gray_noise_is_equal_in_equal_channels():
    image = torch.rand(3, 64, 64)
    target = target_of(image, "gray_denoise25")
    noisy = degrade(target, "gray_denoise25", torch.Generator().manual_seed(0))
    expected = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    for channel in range(3):
        torch.testing.assert_close(target[channel], expected)
        assert torch.equal(noisy[channel], noisy[0])
    assert abs((noisy - target).std().item() * 255 - 25) < 1.5
    assert torch.equal(target_of(image, "denoise"), image)
    assert torch.equal(target_of(image[:1], "gray_denoise"), image[:1])


@pytest.mark.parametrize("correlation", [0.0, 0.4, 1.0])
def test_alike_noise_has_the_asked_correlation(correlation):
    image = torch.full((3, 200, 200), 0.5)
    noise = add_alike_noise(image, 30, correlation, torch.Generator().manual_seed(0)) - image
    measured = torch.corrcoef(noise.flatten(1))
    assert (noise.std((1, 2)) * 255 - 30).abs().max() < 0.5
    assert (measured[~torch.eye(3, dtype=torch.bool)] - correlation).abs().max() < 0.02
    with pytest.raises(ValueError, match="correlation must be in"):
        add_alike_noise(image, 30, 1.1, torch.Generator())


def test_luma_noise_is_wholly_alike_half_of_the_time():
    image, alike = torch.full((3, 16, 16), 0.5), 0
    for seed in range(200):
        noisy = degrade(image, "luma_denoise25", torch.Generator().manual_seed(seed))
        alike += torch.allclose(noisy[0], noisy[2], atol=1e-6)
    assert 70 < alike < 130


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_shrinking_is_imresize_rounded(dtype, scale):
    top = torch.iinfo(dtype).max
    image = torch.randint(0, top + 1, (3, 25, 38), dtype=torch.int32).to(dtype)
    found = shrink(image, scale)
    expected = imresize(image.double(), 1 / scale).round().clamp(0, top)
    assert found.dtype == dtype and (found.double() - expected).abs().max() <= (dtype == torch.uint16)


def test_noise_of_a_camera_in_gray_photos():
    image = torch.full((1, 16, 16), 0.5, dtype=torch.float64)
    noisy = degrade(image, "camera", torch.Generator().manual_seed(0))
    assert noisy.shape == image.shape and noisy.dtype == image.dtype and noisy.std() > 0
