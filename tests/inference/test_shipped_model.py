"""The weights that ship really restore: measured, not read from a table."""

import importlib.resources
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

import ipt_fast
from ipt_fast.evaluation.metrics import psnr
from ipt_fast.evaluation.protocols import get_protocol
from ipt_fast.inference import Restorer


@pytest.fixture(scope="module")
def restorer():
    return Restorer(ipt_fast.create_model("ipt_v2_tiny", pretrained=True), dtype="float32", tile=None)


def gain(restorer, clean, sigma):
    """PSNR before and after, by the rgb protocol's noise."""
    noisy = get_protocol("rgb").add_noise(clean / 255, sigma)
    restored = restorer(noisy)
    return psnr(noisy, clean / 255, data_range=1), psnr(restored.clip(0, 1), clean / 255, data_range=1)


@pytest.mark.parametrize(("sigma", "least"), [(5, 1), (15, 5), (25, 8), (50, 10)])
def test_photo_that_ships(restorer, sigma, least):
    path = importlib.resources.files("ipt_fast") / "assets" / "chelsea.png"
    before, after = gain(restorer, np.asarray(PIL.Image.open(path)), sigma)
    assert after > before + least


@pytest.mark.skipif("IPT_FAST_DATA" not in os.environ, reason="IPT_FAST_DATA does not name the public test images")
def test_cbsd68_target_on_every_fourth_image(restorer):
    paths = sorted(pathlib.Path(os.environ["IPT_FAST_DATA"], "denoise", "CBSD68").glob("*.png"))[::4]
    scores = [gain(restorer, np.asarray(PIL.Image.open(path)), 25) for path in paths]
    before, after = np.mean(scores, axis=0)
    assert before == pytest.approx(20.2, abs=0.1)
    assert after >= 29.0


def test_checkpoint_is_small():
    path = importlib.resources.files("ipt_fast") / "assets" / "ipt_v2_tiny" / "model.safetensors"
    assert path.stat().st_size <= 4e6
