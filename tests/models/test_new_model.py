"""A model is a class and the line that registers it: everything else works without knowing it."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.inference import Restorer
from ipt_fast.models import (
    Contract,
    Preset,
    PretrainedModel,
    _registry,
    describe,
    open_checkpoint,
    open_model,
    register,
)
from ipt_fast.modules import LayerNorm2d, RepLeFFN
from ipt_fast.modules._layer import reason_against_fusing, residual


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 4


class Toy(PretrainedModel):
    """One feed-forward network between two convolutions; takes colours from 0 to 255."""

    config_class = ToyConfig
    presets = {"toy": Preset({"width": 8})}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.enter, self.leave = nn.Conv2d(3, config.width, 3, padding=1), nn.Conv2d(config.width, 3, 3, padding=1)
        self.norm, self.ffn = LayerNorm2d(config.width), RepLeFFN(config.width)

    @property
    def contract(self):
        return Contract(in_channels=3, out_channels=3, value_range=255, reparameterize=self.reparameterize)

    def reparameterize(self):
        self.ffn.reparameterize()

    def reasons_against_fusing(self):
        return {"ffn": reason_against_fusing(self.norm, self.ffn)}

    def forward(self, x):
        return x + 255 * self.leave(residual(self.enter(x / 255), self.norm, self.ffn))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name in ("CLASSES", "PRESETS"):
        monkeypatch.setattr(_registry, name, dict(getattr(_registry, name)))
    register(Toy)


@pytest.fixture
def folder(tmp_path):
    ipt_fast.create_model("toy").save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photos" / "one.png")
    return tmp_path / "photos"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_by_name(folder):
    assert "toy" in ipt_fast.list_models()
    model = ipt_fast.create_model("toy", width=6)
    assert isinstance(model, Toy) and model.config.width == 6 and model.training
    with pytest.raises(ValueError, match="config must have fields of ToyConfig: width; got depth"):
        ipt_fast.create_model("toy", depth=1)
    with pytest.raises(
        ValueError, match="name must be one of ipt_tiny, ipt_v2_tiny, .*, for which trained weights ship"
    ):
        ipt_fast.create_model("toy", pretrained=True)
    with pytest.raises(ValueError, match="presets must have new names; got toy"):
        register(Toy)
    opened = open_model(folder)
    assert isinstance(opened, Toy) and opened.config == ToyConfig(8) and not opened.training
    state = opened.state_dict()
    again = open_checkpoint(folder, "toy")
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_restoring_merges_and_scales(folder):
    model = open_model(folder)
    image = torch.rand(1, 3, 20, 21)
    with torch.no_grad():
        expected = model(255 * image) / 255
    restorer = Restorer(model, dtype="float32")
    assert restorer.model._plain.ffn.merged and not model.ffn.merged
    torch.testing.assert_close(restorer(image), expected, rtol=1e-4, atol=1e-5)
    assert restorer(np.zeros((5, 6), np.uint8)).shape == (5, 6, 1)[: restorer(np.zeros((5, 6), np.uint8)).ndim]
    with pytest.raises(ValueError, match="image must have 3 channels"):
        restorer(torch.rand(1, 2, 20, 21))
    compiled = torch.compile(model, backend="eager")
    assert describe(compiled).value_range == 255
    torch.testing.assert_close(ipt_fast.restore(image, compiled, dtype="float32"), expected, rtol=1e-4, atol=1e-5)


def test_explaining_and_plain_twin(folder):
    model = open_model(folder)
    assert ipt_fast.explain(model) == {"ffn": None}
    twin = model.to_reference()
    assert ipt_fast.explain(twin) == {"ffn": "it is a plain twin"}
    x = 255 * torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-3)


def test_commands(folder, photos, tmp_path, capsys):
    photo, options = photos / "one.png", ["--model", folder, "--device", "cpu"]
    assert run("restore", photo, tmp_path / "out.png", *options, "--noise", 25) == 0
    assert PIL.Image.open(tmp_path / "out.png").size == (40, 40)
    assert run("eval", "--data", photos, "--sigma", 25, *options) == 0
    assert run("plot", "restorations", tmp_path / "plot.png", "--model", folder, "--image", photo) == 0
    assert run("convert", folder / "model.safetensors", tmp_path / "no", "--model", "toy") == 2
    torch.save(open_model(folder).state_dict(), tmp_path / "toy.pth")
    assert run("convert", tmp_path / "toy.pth", tmp_path / "converted", "--model", "toy") == 0
    assert isinstance(open_model(tmp_path / "converted"), Toy)
    checkpoint = ["--model", "toy", "--checkpoint", tmp_path / "toy.pth", "--device", "cpu"]
    assert run("restore", photo, tmp_path / "same.png", *checkpoint) == 0
    assert run("info") == 0 and "toy" in capsys.readouterr().out


def test_training(photos, tmp_path, capsys):
    options = [
        "--data",
        photos,
        "--val",
        photos,
        "--iterations",
        2,
        "--patch",
        16,
        "--batch-size",
        2,
        "--device",
        "cpu",
    ]
    assert run("train", *options, "--model", "toy", "--out", tmp_path / "run") == 0
    assert isinstance(open_model(tmp_path / "run"), Toy)
    assert run("finetune", *options, "--model", tmp_path / "run", "--task", "denoise", "--out", tmp_path / "more") == 0
    assert run("train", *options, "--model", "toy", "--task", "derain", "--out", tmp_path / "rain") == 0
    assert run("train", *options, "--model", "toy", "--task", "sr_x2", "--out", tmp_path / "no") == 2
    assert "task must magnify 1 times, as the model does; got sr_x2" in capsys.readouterr().err


class Foreign(nn.Module):
    """A module that knows nothing of contracts, but carries one."""

    def __init__(self, contract):
        super().__init__()
        self.contract = contract

    def forward(self, x, task):
        assert x.shape[1:] == (3, 8, 8) and task == "double"
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_a_foreign_module_may_carry_a_contract():
    contract = Contract(in_channels=3, image_size=8, tasks=("double",), takes_task=True, scale=lambda task: 2)
    image = torch.rand(1, 3, 11, 9)
    restored = ipt_fast.restore(image, Foreign(contract), task="double")
    torch.testing.assert_close(restored, image.repeat_interleave(2, 2).repeat_interleave(2, 3))
    promised = dataclasses.replace(contract, out_channels=1)
    with pytest.raises(ValueError, match="model must return the 1 channels of its contract; got 3"):
        ipt_fast.restore(image, Foreign(promised), task="double")


def test_a_module_that_tells_nothing():
    assert describe(nn.Identity()) == Contract()


def test_an_error_in_a_contract_is_not_taken_for_none():
    class Broken(nn.Module):
        @property
        def contract(self):
            return self.no_such_field

    with pytest.raises(AttributeError):
        describe(Broken())
