"""The ways in which the field's tables were measured. They differ by up to 0.1 dB and more.

In every protocol images are float arrays in [0, 1], (H, W) or (H, W, C); an output is clipped, and in all but two
rounded to 8 bits as if it had been saved as an image; border pixels can be left out (super-resolution: `scale`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .metrics import mae, psnr, rgb_to_y, ssim

SEED = 0


@dataclass(frozen=True)
class Protocol:
    """What is compared, and how noise is made.

    Attributes:
        name: as given to `ipt-fast eval --protocol`.
        description: one line on what it measures and who uses it.
        plane: from an image on the 0..255 scale to what PSNR and SSIM are computed on, on the same scale.
        clip_noise: whether a noisy input is clipped to [0, 1].
        round_to_8_bits: whether output and target are rounded to 8 bits before they are compared.
        ssim_window: of SSIM, see `ipt_fast.evaluation.metrics.ssim`.
        takes_mae: whether the tables have the mean absolute error, too.
    """

    name: str
    description: str
    plane: Callable[[np.ndarray], np.ndarray]
    clip_noise: bool = False
    round_to_8_bits: bool = True
    ssim_window: str = "gaussian"
    takes_mae: bool = False

    def add_noise(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """The image with white Gaussian noise of standard deviation `sigma` (0..255 scale), as float32.

        The noise is numpy's RandomState(0).normal of the image's shape, drawn anew for each image and added to its
        float32 values, so it is the noise with which Restormer's figures were measured.

        Raises:
            ValueError: sigma is negative or not finite.
        """
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma must be finite and at least 0; got {sigma}")
        noisy = np.float32(image) + np.random.RandomState(SEED).normal(0, sigma / 255, np.shape(image))
        return (np.clip(noisy, 0, 1) if self.clip_noise else noisy).astype(np.float32)

    def score_output(self, output: np.ndarray, target: np.ndarray, *, crop: int = 0) -> tuple[float, float]:
        """(PSNR in dB, SSIM) of a model's output without `crop` border pixels.

        Raises:
            ValueError: the shapes differ, the output holds NaN, or crop leaves less than SSIM needs.
        """
        scores = self.measure_output(output, target, crop=crop)
        return scores["psnr"], scores["ssim"]

    def score_input(self, image: np.ndarray, target: np.ndarray, *, crop: int = 0) -> tuple[float, float]:
        """(PSNR in dB, SSIM) of a model's input exactly as the model gets it, otherwise as for `score_output`."""
        scores = self.measure_input(image, target, crop=crop)
        return scores["psnr"], scores["ssim"]

    def measure_output(self, output: np.ndarray, target: np.ndarray, *, crop: int = 0) -> dict[str, float]:
        """All that the protocol measures, "psnr" (dB), "ssim" and with `takes_mae` "mae"; as for `score_output`."""
        if np.isnan(output).any():
            raise ValueError(f"output must be finite or infinite; got {int(np.isnan(output).sum())} NaN")
        output = 255 * np.clip(np.asarray(output, dtype=np.float64), 0, 1)
        return self._measure(np.rint(output) if self.round_to_8_bits else output, target, crop)

    def measure_input(self, image: np.ndarray, target: np.ndarray, *, crop: int = 0) -> dict[str, float]:
        """The same of a model's input, as for `score_input`."""
        return self._measure(255 * np.asarray(image, dtype=np.float64), target, crop)

    def _measure(self, image: np.ndarray, target: np.ndarray, crop: int) -> dict[str, float]:
        target = 255 * np.asarray(target, dtype=np.float64)
        target = np.rint(target) if self.round_to_8_bits else target
        planes = self.plane(image), self.plane(target)  # of Y, which gray and RGB both have
        if planes[0].shape != planes[1].shape:
            raise ValueError(f"image and target must have the same shape; got {image.shape} and {target.shape}")
        image, target = (without_border(plane, crop) for plane in planes)
        scores = {
            "psnr": psnr(image, target, data_range=255),
            "ssim": ssim(image, target, data_range=255, window=self.ssim_window),
        }
        return scores | ({"mae": mae(image, target, data_range=255)} if self.takes_mae else {})


def without_border(image: np.ndarray, crop: int) -> np.ndarray:
    """(H, W, ...) without `crop` pixels on each side.

    Raises:
        ValueError: crop is negative or leaves nothing.
    """
    if crop < 0 or 2 * crop >= min(image.shape[:2]):
        raise ValueError(f"crop must be at least 0 and leave some of {image.shape[:2]}; got {crop}")
    return image[crop : image.shape[0] - crop, crop : image.shape[1] - crop]


def _rgb(image: np.ndarray) -> np.ndarray:
    return image


def _ipt_y(image: np.ndarray) -> np.ndarray:
    # Luma is affine, so the difference of two lumas is the luma weights applied to the difference, as IPT computes it.
    return rgb_to_y(image, (65.738, 129.057, 25.064), 256)


def _bt601_y(image: np.ndarray) -> np.ndarray:
    return rgb_to_y(image, (65.481, 128.553, 24.966), 255)


def _rounded_bt601_y(image: np.ndarray) -> np.ndarray:
    return np.rint(_bt601_y(image))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("rgb", "RGB, noise not clipped: Gaussian denoising in Restormer and IPT-V2", _rgb),
        Protocol("ipt-y", "Y of the 8-bit difference, noisy input clipped: all tables of IPT", _ipt_y, clip_noise=True),
        Protocol("basicsr-y", "BT.601 Y of the float output: super-resolution", _bt601_y, round_to_8_bits=False),
        Protocol("matlab-y", "BT.601 Y rounded to 8 bits: deraining tables", _rounded_bt601_y),
        Protocol(
            "dpdd",
            "RGB of the float output, SSIM of 7 x 7 windows, MAE: defocus deblurring",
            _rgb,
            round_to_8_bits=False,
            ssim_window="uniform",
            takes_mae=True,
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}")
    return PROTOCOLS[name]
