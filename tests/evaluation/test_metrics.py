"""PSNR, SSIM, MAE and luma: known values, and SSIM against a loop over windows and pixels."""

from math import exp, log10

import numpy as np
import pytest

from ipt_fast.evaluation.metrics import mae, psnr, rgb_to_y, ssim

BT601 = (65.481, 128.553, 24.966)


def image(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def test_psnr_of_a_constant_error():
    target = image(5, 7, 3)
    assert psnr(target + 0.1, target, data_range=1) == pytest.approx(20.0)
    assert psnr(255 * target + 1, 255 * target, data_range=255) == pytest.approx(20 * log10(255))


def test_psnr_takes_all_channels_together():
    target = np.zeros((4, 4, 2))
    output = target.copy()
    output[..., 0] = 0.1  # mean squared error 0.005, not the mean of 20 dB and infinity
    assert psnr(output, target, data_range=1) == pytest.approx(-10 * log10(0.005))


def test_psnr_of_8_bit_arrays_does_not_wrap_around():
    assert psnr(np.uint8([[0]]), np.uint8([[255]]), data_range=255) == pytest.approx(0.0)


def test_equal_images():
    same = image(12, 13, 3)
    assert psnr(same, same, data_range=1) == float("inf")
    assert ssim(same, same, data_range=1) == pytest.approx(1.0)


def test_ssim_of_constant_images():
    """Variances vanish, so only the luminance term is left."""
    x, y, c1 = 0.2, 0.6, 0.01**2
    expected = (2 * x * y + c1) / (x**2 + y**2 + c1)
    assert ssim(np.full((11, 20), x), np.full((11, 20), y), data_range=1) == pytest.approx(expected)


def naive_ssim(x, y, peak):
    """Equation 13 of Wang et al. with a loop over every window that fits and every pixel in it, for one channel."""
    weights = {(a, b): exp(-(a * a + b * b) / (2 * 1.5**2)) for a in range(-5, 6) for b in range(-5, 6)}
    total = sum(weights.values())
    values = []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            pairs = [(w / total, x[i + a, j + b], y[i + a, j + b]) for (a, b), w in weights.items()]
            mx, my = sum(w * p for w, p, _ in pairs), sum(w * q for w, _, q in pairs)
            vx = sum(w * (p - mx) ** 2 for w, p, _ in pairs)
            vy = sum(w * (q - my) ** 2 for w, _, q in pairs)
            vxy = sum(w * (p - mx) * (q - my) for w, p, q in pairs)
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return sum(values) / len(values)


@pytest.mark.parametrize("shape", [(11, 11), (13, 16), (12, 11, 3)])
@pytest.mark.parametrize("peak", [1, 255])
def test_ssim_equals_the_naive_loop(shape, peak):
    x = peak * image(*shape)
    y = np.clip(x + 0.2 * peak * (image(*shape, seed=1) - 0.4), 0, peak)
    channels = [(x, y)] if x.ndim == 2 else [(x[..., c], y[..., c]) for c in range(shape[2])]
    expected = np.mean([naive_ssim(*pair, peak) for pair in channels])
    assert 0.05 < expected < 0.99
    assert ssim(x, y, data_range=peak) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shape", [(7, 7), (9, 12, 3)])
def test_ssim_of_uniform_windows(shape):
    """Each window's own means, variances and covariance as numpy has them, those of a sample (ddof 1)."""
    x = image(*shape)
    y = np.clip(x + 0.2 * (image(*shape, seed=1) - 0.4), 0, 1)
    values = []
    for i in range(shape[0] - 6):
        for j in range(shape[1] - 6):
            for a, b in zip(*(each[i : i + 7, j : j + 7].reshape(49, -1).T for each in (x, y)), strict=True):
                (vx, vxy), (_, vy) = np.cov(a, b, ddof=1)
                top = (2 * a.mean() * b.mean() + 0.01**2) * (2 * vxy + 0.03**2)
                values.append(top / ((a.mean() ** 2 + b.mean() ** 2 + 0.01**2) * (vx + vy + 0.03**2)))
    assert ssim(x, y, data_range=1, window="uniform") == pytest.approx(np.mean(values), rel=1e-10)


def test_mae():
    target = image(5, 7, 3)
    assert mae(target - 0.1, target, data_range=1) == pytest.approx(0.1)
    assert mae(np.uint8([[0, 255]]), np.uint8([[255, 255]]), data_range=255) == 0.5
    assert mae(target, target, data_range=1) == 0


def test_luma_of_known_colours():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]])
    expected = [[16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966]]
    assert rgb_to_y(colours, BT601, 255) == pytest.approx(np.array(expected))


def test_luma_of_gray_is_that_of_three_equal_channels():
    gray = 255 * image(3, 4)
    expected = rgb_to_y(np.repeat(gray[..., None], 3, axis=2), BT601, 255)
    assert (rgb_to_y(gray, BT601, 255) == expected).all()
    assert (rgb_to_y(gray[..., None], BT601, 255) == expected).all()
    assert rgb_to_y(np.array([[0, 255]]), BT601, 255) == pytest.approx(np.array([[16, 235]]))


@pytest.mark.parametrize("metric", [psnr, ssim, mae])
def test_bad_input(metric):
    good = image(12, 12)
    with pytest.raises(ValueError, match=r"same shape; got \(12, 12\) and \(12, 11\)"):
        metric(good, good[:, :11], data_range=1)
    with pytest.raises(ValueError, match="data_range must be positive; got 0"):
        metric(good, good, data_range=0)
    with pytest.raises(ValueError, match="not empty"):
        metric(good[:0], good[:0], data_range=1)
    with pytest.raises(ValueError, match=r"got shape \(12,\)"):
        metric(good[0], good[0], data_range=1)


def test_bad_shapes():
    with pytest.raises(ValueError, match="at least 11x11 pixels for SSIM; got 10x30"):
        ssim(image(10, 30), image(10, 30), data_range=1)
    with pytest.raises(ValueError, match="at least 7x7 pixels for SSIM; got 6x30"):
        ssim(image(6, 30), image(6, 30), data_range=1, window="uniform")
    with pytest.raises(ValueError, match="window must be one of gaussian, uniform; got 'flat'"):
        ssim(image(12, 12), image(12, 12), data_range=1, window="flat")
    with pytest.raises(ValueError, match=r"\(H, W, 3\); got shape \(4, 4, 2\)"):
        rgb_to_y(image(4, 4, 2), BT601, 255)
