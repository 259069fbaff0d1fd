"""Files of Restormer's weights: their tensors tell the shape, whatever the name; saved models open again."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.models import Restormer, open_checkpoint, open_model
from ipt_fast.models._restormer_config import fields_of
from tests.models.micro import micro_model
from tests.models.small_restormer import CONFIG, small_restormer

# The published models' norms and channels; other shapes.
SHAPES = [
    {"norm": "bias_free"},
    {"norm": "bias_free", "in_channels": 1},
    {"in_channels": 6},
    {"bias": True, "heads": (2, 2, 1, 4), "refinement": 0, "ffn_ratio": 3},
]


@pytest.mark.parametrize("name", ["restormer", "restormer_denoising", "restormer_dual_pixel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tensors_tell_the_shape(shape, name, tmp_path):
    model = small_restormer(**shape)
    torch.save({"params": model.state_dict()}, tmp_path / "published.pth")
    opened = open_checkpoint(tmp_path / "published.pth", name)
    assert opened.config == model.config and not opened.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in opened.state_dict().items())
    loaded = ipt_fast.load_checkpoint(ipt_fast.create_model("restormer", **CONFIG | shape), tmp_path / "published.pth")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_the_name_tells_the_windows(tmp_path):
    model, x = small_restormer(), torch.rand(1, 3, 24, 40)
    torch.save({"params": model.state_dict()}, tmp_path / "published.pth")
    local = open_checkpoint(tmp_path / "published.pth", "restormer_local")
    assert local.config == small_restormer("restormer_local").config
    smaller = open_checkpoint(tmp_path / "published.pth", "restormer", training_patch=8)
    expected = small_restormer(training_patch=8)
    expected.load_state_dict(model.state_dict())
    assert torch.equal(smaller(x), expected(x)) and not torch.equal(smaller(x), model(x))


@pytest.mark.parametrize("ratio", [2.66, 1, 1.5, 2, 2.5, 2.7, 8 / 3, 1.234])
@pytest.mark.parametrize("width", [8, 48])
def test_the_ratio_of_hidden_channels(ratio, width):
    with torch.device("meta"):
        model = ipt_fast.create_model("restormer", width=width, depths=(1, 1, 1, 1), refinement=0, ffn_ratio=ratio)
        fields = fields_of(model.state_dict(), "memory")
        again = ipt_fast.create_model("restormer", **fields)
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (model, again)]
    assert shapes[0] == shapes[1]
    assert fields["ffn_ratio"] == ratio or (ratio, width) != (2.66, 48)


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(small_restormer().state_dict(), path)
    with pytest.raises(ValueError, match=r"norm must be with_bias as in .*weights.pth; got 'bias_free'"):
        open_checkpoint(path, "restormer", norm="bias_free")
    with pytest.raises(ValueError, match="config must have fields of RestormerConfig: .*; got colour"):
        open_checkpoint(path, "restormer", colour=3)
    with pytest.raises(ValueError, match=r"path must fit this Restormer; got .*unexpected"):
        ipt_fast.load_checkpoint(ipt_fast.create_model("restormer", norm="bias_free", **CONFIG), path)
    torch.save(micro_model().state_dict(), path)
    with pytest.raises(ValueError, match=r"path must hold a Restormer; got .*which lacks patch_embed.proj.weight"):
        open_checkpoint(path, "restormer")
    state = small_restormer().state_dict()
    torch.save({**state, "output.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"path must hold a Restormer; got .*output.weight has shape \(3,\)"):
        open_checkpoint(path, "restormer")
    torch.save({**state, "latent.0.ffn.project_out.weight": torch.zeros(64, 7, 1, 1)}, path)
    with pytest.raises(ValueError, match="path must have one ratio of hidden channels"):
        open_checkpoint(path, "restormer")


def test_saved_and_opened_again(tmp_path):
    model, x = small_restormer("restormer_local", training_patch=8), torch.rand(1, 3, 24, 24)
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert isinstance(opened, Restormer) and opened.config == model.config and torch.equal(opened(x), model(x))
    assert Restormer.from_pretrained(tmp_path, training_patch=None).config == small_restormer().config


def test_commands(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 27, 3), dtype=np.uint8)
    photo, file, folder = tmp_path / "photo.png", tmp_path / "published.pth", tmp_path / "folder"
    PIL.Image.fromarray(pixels).save(photo)
    model = small_restormer("restormer_denoising")
    torch.save({"params": model.state_dict()}, file)

    def run(*arguments):
        device = ["--device", "cpu"] if arguments[0] == "restore" else []
        return main([*map(str, arguments), *device])

    assert run("restore", photo, tmp_path / "a.png", "--model", "restormer", "--checkpoint", file) == 0
    assert run("convert", file, folder, "--model", "restormer") == 0
    assert run("restore", photo, tmp_path / "b.png", "--model", folder) == 0
    restored = [np.asarray(PIL.Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    assert np.array_equal(*restored) and restored[0].shape == pixels.shape
    assert np.array_equal(restored[0], ipt_fast.restore(pixels, model))
    torch.save(micro_model().state_dict(), file)
    assert run("restore", photo, tmp_path / "c.png", "--model", "restormer", "--checkpoint", file) == 2
    assert "--checkpoint must tell the shape of restormer: path must hold a Restormer" in capsys.readouterr().err


def test_trained_by_the_command(tmp_path):
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    model = ["--model", "restormer_local", "--model-config", json.dumps({**CONFIG, "training_patch": 16})]
    steps = ["--batch-size", "2", "--save-every", "1", "--device", "cpu", "--data", str(tmp_path / "photos")]

    def train(out, iterations, *options):
        schedule = ["--patch", "16", "--warmup", "0", "--schedule", "constant", "--iterations", str(iterations)]
        assert main(["train", *steps, *schedule, "--out", str(tmp_path / out), *options]) == 0
        return open_model(tmp_path / out)

    whole = train("whole", 2, *model)
    assert isinstance(whole, Restormer) and whole.config.training_patch == 16
    again = train("checkpointed", 2, *model, "--activation-checkpointing")
    started = train("begun", 1, *model)
    states = [each.state_dict() for each in (whole, again, started)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["output.weight"], states[2]["output.weight"])
