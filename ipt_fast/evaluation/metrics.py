"""PSNR, SSIM, mean absolute error and luma, computed in float64 on numpy arrays of shape (H, W) or (H, W, C)."""

import numpy as np
from numpy.typing import ArrayLike

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def psnr(output: ArrayLike, target: ArrayLike, *, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels; infinite for equal images.

    10 log10(data_range² / MSE).

    Args:
        output, target: (H, W) or (H, W, C) of the same shape, on the same scale.
        data_range: the peak of that scale: 1 for [0, 1], 255 for 8 bits.

    Raises:
        ValueError: the shapes differ, an image is empty or has another rank, or data_range is not positive.
    """
    output, target = _checked(output, target, data_range)
    error = np.mean((output - target) ** 2)
    return float(10 * np.log10(data_range**2 / error)) if error > 0 else float("inf")


def mae(output: ArrayLike, target: ArrayLike, *, data_range: float) -> float:
    """Mean absolute error over all pixels and channels as a part of `data_range`, so in [0, 1]; 0 for equal images.

    Args and errors as for `psnr`.
    """
    output, target = _checked(output, target, data_range)
    return float(np.mean(np.abs(output - target)) / data_range)


def ssim(output: ArrayLike, target: ArrayLike, *, data_range: float, window: str = "gaussian") -> float:
    """Structural similarity: the mean over the valid area and then over channels; 1 for equal images.

    K1 = 0.01 and K2 = 0.03 (Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
    TIP 2004, eq. 13), only where the whole window lies inside the image.

    Args:
        output, target, data_range: as for `psnr`.
        window: "gaussian", the paper's: 11 x 11 with sigma 1.5. "uniform": 7 x 7 equal weights and the variances of a
            sample, which divide by 48 instead of 49; the default of scikit-image.

    Raises:
        ValueError: as `psnr`, another window, or an image smaller than it.
    """
    output, target = _checked(output, target, data_range)
    if window not in _WINDOWS:
        raise ValueError(f"window must be one of {', '.join(_WINDOWS)}; got {window!r}")
    taps, unbiased = _WINDOWS[window]
    if min(output.shape[:2]) < len(taps):
        raise ValueError(f"images must have at least {len(taps)}x{len(taps)} pixels for SSIM; got {_size(output)}")
    mean_x, mean_y = _blur(output, taps), _blur(target, taps)
    variance_x = unbiased * (_blur(output**2, taps) - mean_x**2)
    variance_y = unbiased * (_blur(target**2, taps) - mean_y**2)
    covariance = unbiased * (_blur(output * target, taps) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    # Every channel has as many pixels, so the mean over all is the mean of the channels' means.
    return float(np.mean(luminance * structure))


def rgb_to_y(image: ArrayLike, weights: ArrayLike, divisor: float) -> np.ndarray:
    """Luma 16 + (image · weights) / divisor of an RGB image on the 0..255 scale: (H, W, 3) -> (H, W) float64.

    BT.601: weights (65.481, 128.553, 24.966), divisor 255. The rounded variant that IPT uses: weights
    (65.738, 129.057, 25.064), divisor 256. A gray image, (H, W) or (H, W, 1), counts as three equal channels, as in the
    field's tables, whose programs read gray files so.

    Raises:
        ValueError: the image has another shape.
    """
    image = np.asarray(image, dtype=np.float64)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"image must be (H, W), (H, W, 1) or (H, W, 3); got shape {image.shape}")
    if image.shape[2] == 1:
        image = image.repeat(3, axis=2)
    return 16 + image @ (np.asarray(weights, dtype=np.float64) / divisor)


def _checked(output: ArrayLike, target: ArrayLike, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    output, target = np.asarray(output, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if output.shape != target.shape:
        raise ValueError(f"output and target must have the same shape; got {output.shape} and {target.shape}")
    if output.ndim not in (2, 3) or output.size == 0:
        raise ValueError(f"images must be (H, W) or (H, W, C) and not empty; got shape {output.shape}")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive; got {data_range}")
    return output, target


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _blur(image: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """The mean over a window with these weights, rows then columns, valid area only."""
    for axis in (0, 1):
        image = np.lib.stride_tricks.sliding_window_view(image, len(taps), axis=axis) @ taps
    return image


def _gaussian_taps() -> np.ndarray:
    taps = np.exp(-((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2))
    return taps / taps.sum()


# {name: (weights along a side, factor of the variances)}
_WINDOWS = {"gaussian": (_gaussian_taps(), 1.0), "uniform": (np.full(7, 1 / 7), 49 / 48)}
