"""Whole models on the C++ kernels against the reference, on photos (or on noise where there are none)."""

import os
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast import _extension

pytestmark = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))

DATA = os.environ.get("IPT_FAST_DATA")


def photo(height, width):
    """(1, 3, height, width) of the shipped photo, or of one of CBSD68 where the data are at hand."""
    path = pathlib.Path(ipt_fast.__file__).parent / "assets" / "chelsea.png"
    if DATA:
        path = next(iter(sorted(pathlib.Path(DATA, "denoise", "CBSD68").glob("*.png"))), path)
    image = np.asarray(PIL.Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(image[:height, :width]).permute(2, 0, 1)[None].contiguous()


def on(backend, model, x):
    with ipt_fast.use_backend(backend), torch.inference_mode():
        return model(x).float()


def psnr(a, b):
    return -10 * (a - b).square().mean().log10().item()


SIGMA = 25 / 255
MODELS = [("ipt_v2_tiny", 181, 237), ("ipt_v2_small", 96, 141), ("ipt_v2_base", 67, 96)]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(("name", "height", "width"), MODELS)
def test_whole_models(name, height, width, merged):
    torch.manual_seed(0)
    model = ipt_fast.create_model(name, pretrained=name == "ipt_v2_tiny", merged=merged).eval()
    clean = photo(height, width)
    noisy = clean + SIGMA * torch.randn(clean.shape)
    if name != "ipt_v2_tiny":  # untrained: a residual as large as a trained model's, which is the noise
        residual = on("cpu", model, noisy) - noisy
        model.output.weight.data *= SIGMA / residual.std()
    plain = on("reference", model, noisy)
    assert (on("cpu", model, noisy) - plain).abs().max() < 1e-4

    model, noisy = model.bfloat16(), noisy.bfloat16()
    ours, plain = on("cpu", model, noisy), on("reference", model, noisy)
    assert psnr(ours, plain) > 50
    assert abs(psnr(ours, clean) - psnr(plain, clean)) < 0.02
