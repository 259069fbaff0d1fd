"""The diffusion indices of several models on several photos."""

import csv

import numpy as np
import PIL.Image
import pytest
import torch

from benchmarks import attribution
from tests.models.micro import micro_model


def test_rows_of_every_model_and_photo(tmp_path, capsys):
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in "abc":
        PIL.Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    for order in ("focal", "grid"):
        micro_model(depths=(2, 0, 0, 0), order=order).save_pretrained(tmp_path / order)
    models = [str(tmp_path / order) for order in ("focal", "grid")]
    arguments = ["--data", str(tmp_path / "photos"), "--every", "2", "--crop", "40", "--window", "8", "--steps", "2"]
    attribution.main(["--model", *models, *arguments, "--csv", str(tmp_path / "indices.csv")])
    rows = list(csv.DictReader((tmp_path / "indices.csv").open()))
    assert [(row["model"], row["image"]) for row in rows] == [
        (m, i) for m in ("focal", "grid") for i in ("a.png", "c.png")
    ]
    assert all(0 < float(row["diffusion_index"]) < 100 for row in rows)
    mean = (float(rows[0]["diffusion_index"]) + float(rows[1]["diffusion_index"])) / 2
    assert f"diffusion index {mean:.2f}" in capsys.readouterr().out
    arguments[5] = "41"
    with pytest.raises(ValueError, match="at least 41 pixels"):
        attribution.main(["--model", *models, *arguments, "--csv", str(tmp_path / "other.csv")])


def test_share_that_is_far_away():
    magnitude = torch.zeros(100, 100)
    magnitude[50, 50] = magnitude[90, 50] = magnitude[50, 8] = 1
    assert attribution.share_beyond(magnitude, (45, 45, 10), 32) == pytest.approx(2 / 3)
    assert attribution.share_beyond(magnitude, (45, 45, 10), 36) == pytest.approx(1 / 3)
    assert attribution.share_beyond(magnitude, (45, 45, 10), 40) == pytest.approx(0)
