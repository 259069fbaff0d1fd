"""The weights that ship really restore: measured, not read from a table."""

import importlib.resources
import os
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast.data.degradations import add_alike_noise, degrade
from ipt_fast.data.resize import imresize
from ipt_fast.evaluation.metrics import psnr
from ipt_fast.evaluation.protocols import get_protocol
from ipt_fast.evaluation.runner import evaluate
from ipt_fast.inference import Restorer
from ipt_fast.models import shipped_models


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


needs_data = pytest.mark.skipif(
    "IPT_FAST_DATA" not in os.environ, reason="IPT_FAST_DATA does not name the public test images"
)


def images(*folder, step=1):
    paths = sorted(pathlib.Path(os.environ["IPT_FAST_DATA"], *folder).iterdir())[::step]
    return [np.asarray(PIL.Image.open(path)) for path in paths]


@needs_data
def test_cbsd68_target_on_every_fourth_image(restorer):
    before, after = np.mean([gain(restorer, image, 25) for image in images("denoise", "CBSD68", step=4)], axis=0)
    assert before == pytest.approx(20.2, abs=0.1)
    assert after >= 30.7


@needs_data
def test_gray_photos_through_the_colour_model(restorer):
    """Set12; BM3D has 29.97 on all twelve images, DnCNN 30.44."""
    before, after = np.mean([gain(restorer, image, 25) for image in images("denoise", "Set12", step=2)], axis=0)
    assert before == pytest.approx(20.2, abs=0.1)
    assert after >= 29.4


@pytest.mark.parametrize("shared", [1.0, 0.5, 0.0])
def test_noise_that_the_channels_share(restorer, shared):
    path = importlib.resources.files("ipt_fast") / "assets" / "chelsea.png"
    clean = torch.from_numpy(np.array(PIL.Image.open(path))).permute(2, 0, 1).double() / 255
    noisy = add_alike_noise(clean, 25, shared, torch.Generator().manual_seed(0)).permute(1, 2, 0).float().numpy()
    clean = clean.permute(1, 2, 0).numpy()
    before, after = (psnr(image, clean, data_range=1) for image in (noisy, restorer(noisy).clip(0, 1)))
    assert after > before + 9


@pytest.mark.parametrize(
    ("name", "task", "least"),
    [("camera", "camera", 1.5), ("derain", "derain", 5), ("deblur", "motion_deblur", 1)],
)
def test_tasks_of_the_other_models(name, task, least):
    path = importlib.resources.files("ipt_fast") / "assets" / "chelsea.png"
    clean = torch.from_numpy(np.array(PIL.Image.open(path))).permute(2, 0, 1).float() / 255
    model = Restorer(ipt_fast.create_model(f"ipt_v2_tiny_{name}", pretrained=True), dtype="float32", tile=None)
    gains = []
    for seed in range(4):
        degraded = degrade(clean, task, torch.Generator().manual_seed(seed))
        after = model(degraded[None])[0].clamp(0, 1)
        gains.append(
            psnr(after.numpy(), clean.numpy(), data_range=1) - psnr(degraded.numpy(), clean.numpy(), data_range=1)
        )
    assert np.mean(gains) > least


@needs_data
@pytest.mark.parametrize(
    ("name", "folder", "protocol", "before", "least"),
    [
        ("camera", ("denoise_real", "CC15"), "rgb", 33.4, 36.0),
        ("derain", ("derain", "Rain100L"), "matlab-y", 26.6, 33.0),
        pytest.param("deblur", ("deblur", "GoPro"), "rgb", 23.6, 23.8, marks=pytest.mark.slow),
    ],
)
def test_pairs_of_other_people(name, folder, protocol, before, least):
    model = Restorer(ipt_fast.create_model(f"ipt_v2_tiny_{name}", pretrained=True), dtype="float32", tile=None)
    pairs = pathlib.Path(os.environ["IPT_FAST_DATA"], *folder)
    found = evaluate(model, pairs / "input", protocol, target=pairs / "target")
    assert found.mean("psnr_input") == pytest.approx(before, abs=0.1)
    assert found.mean("psnr_output") >= least


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


def test_the_models_that_ship_are_small():
    """All package data together, as people download them."""
    folder = pathlib.Path(str(importlib.resources.files("ipt_fast"))) / "assets"
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 16e6
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(shipped_models())
    assert all((folder / name / "model.safetensors").stat().st_size <= 7e6 for name in shipped_models())


@pytest.mark.parametrize("name", shipped_models())
def test_weights_of_16_bits_are_float32_when_opened(name):
    model = ipt_fast.create_model(name, pretrained=True)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
