"""Latent IPT-V2 beside DiT: equal work, and after equal steps the better samples."""

import pytest
import torch

import ipt_fast
from benchmarks import generation, results


def made(name):
    preset, fields = generation.MODELS[name]
    return ipt_fast.create_model(preset, **fields, in_channels=1, sample_size=generation.SIDE, num_classes=10)


def test_both_multiply_as_often():
    counts = [generation.multiplications(generation.merged(made(name))) for name in generation.MODELS]
    assert max(counts) / min(counts) < 1.02


def test_merged_is_the_same_function():
    model = made("latent_ipt_v2").eval()
    torch.nn.init.normal_(model.final.output.weight, std=0.1)
    inputs = torch.randn(2, 1, 16, 16), torch.tensor([3, 900]), torch.tensor([1, 10])
    torch.testing.assert_close(generation.merged(model)(*inputs), model(*inputs))


@pytest.mark.slow
def test_latent_ipt_v2_learns_digits_faster_than_dit_and_guidance_sharpens(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(generation, "PATH", tmp_path / "rows.csv")
    monkeypatch.setattr(generation, "LOSSES", tmp_path / "losses.csv")
    monkeypatch.setattr(generation, "DOCS", tmp_path)
    sizes = ["--iterations", "1500", "--batch-size", "32", "--ema", "0.98", "--samples", "100", "--steps", "25"]
    generation.main(["digits", "--out", str(tmp_path), *sizes])
    rows = {(row["model"], float(row["guidance"])): row for row in results.read(tmp_path / "rows.csv")}
    ours, theirs = rows["latent_ipt_v2", 1.0], rows["dit", 1.0]
    assert float(ours["classifier_accuracy"]) > 0.95
    assert float(ours["loss"]) < float(theirs["loss"]) and float(ours["frechet"]) < float(theirs["frechet"])
    found = [float(rows["latent_ipt_v2", guidance]["right_class"]) for guidance in (1.0, 4.0)]
    assert found[0] < found[1] and found[1] > 0.5
    assert (tmp_path / "generation_digits.png").exists()
