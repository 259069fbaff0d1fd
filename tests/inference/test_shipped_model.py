"""The weights that ship really restore: measured, not read from a table."""

import importlib.resources
import os
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast.data.degradations import degrade
from ipt_fast.data.resize import imresize
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


@pytest.mark.parametrize(("task", "least"), [("sr_x2", 0.5), ("derain", 3), ("denoise30", 8), ("denoise50", 10)])
def test_tasks_of_ipt(task, least):
    path = importlib.resources.files("ipt_fast") / "assets" / "chelsea.png"
    pixels = np.asarray(PIL.Image.open(path))[50:242, 100:292]
    clean = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    degraded = degrade(clean, task, torch.Generator().manual_seed(0))
    before = imresize(degraded, 2).clamp(0, 1) if task == "sr_x2" else degraded
    model = ipt_fast.create_model("ipt_tiny", pretrained=True)
    after = ipt_fast.restore(degraded[None], model, task=task, dtype="float32")[0].clamp(0, 1)
    gain = psnr(after.numpy(), clean.numpy(), data_range=1) - psnr(before.numpy(), clean.numpy(), data_range=1)
    assert gain > least


@pytest.mark.parametrize(("name", "bytes_at_most"), [("ipt_v2_tiny", 4e6), ("ipt_tiny", 7e6)])
def test_checkpoint_is_small(name, bytes_at_most):
    path = importlib.resources.files("ipt_fast") / "assets" / name / "model.safetensors"
    assert path.stat().st_size <= bytes_at_most
