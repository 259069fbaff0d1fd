"""``ipt-fast convert --dtype``: smaller files, whose weights are float32 again when they are opened."""

import pytest
import torch

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.models import open_model, read_state_dict

SMALL = dict(width=4, depths=(1, 1, 1, 1), refinement=0, heads=(1, 1, 1, 1), window_size=4, grid_size=2)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def dtypes(folder):
    """Of the weights in a folder's file; beside them it has the model's record, of int32 (models/record.py)."""
    return {value.dtype for value in read_state_dict(folder).values() if value.is_floating_point()}


@pytest.fixture
def saved(tmp_path):
    model = ipt_fast.create_model("ipt_v2_tiny", **SMALL)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_rounded_once_and_opened_as_float32(saved, tmp_path, dtype):
    model, folder = saved
    assert run("convert", folder, tmp_path / "half", "--dtype", dtype) == 0
    small, whole = (path.joinpath("model.safetensors").stat().st_size for path in (tmp_path / "half", folder))
    weights = sum(2 * value.numel() for value in model.state_dict().values())
    assert small < whole - 0.99 * weights
    assert dtypes(tmp_path / "half") == {getattr(torch, dtype)}
    opened = open_model(tmp_path / "half").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(opened[name], value.to(getattr(torch, dtype)).float()), name
    assert (tmp_path / "half" / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_model_that_ships_by_its_name(tmp_path):
    assert run("convert", "ipt_v2_tiny", tmp_path / "whole", "--dtype", "float32") == 0
    assert dtypes(tmp_path / "whole") == {torch.float32}


def test_a_file_of_weights_is_converted_and_rounded_at_once(saved, tmp_path):
    model, folder = saved
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = '{"width": 4, "depths": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "window_size": 4, "grid_size": 2}'
    arguments = ["--model", "ipt_v2_tiny", "--model-config", config, "--dtype", "float16"]
    assert run("convert", tmp_path / "weights.pth", tmp_path / "half", *arguments) == 0
    assert dtypes(tmp_path / "half") == {torch.float16}


def test_a_weight_beyond_the_range_is_named_and_nothing_written(saved, tmp_path, capsys):
    model, folder = saved
    with torch.no_grad():
        model.embed.weight[0, 0, 0, 0] = 1e6
    model.save_pretrained(folder)
    assert run("convert", folder, tmp_path / "half", "--dtype", "float16") == 2
    assert (
        "dtype must hold all weights; got torch.float16, and embed.weight has one of 1e+06" in capsys.readouterr().err
    )
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--dtype", "float16", "--model", "ipt"],
            "--model must be left out where FILE is the folder of a saved model",
        ),
        (["--model", "ipt"], "FILE must be weights alone"),
        ([], "FILE must be weights alone"),
    ],
)
def test_what_a_folder_goes_with(saved, tmp_path, capsys, options, message):
    assert run("convert", saved[1], tmp_path / "half", *options) == 2
    assert message in capsys.readouterr().err


def test_a_file_needs_its_architecture(tmp_path, capsys):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    assert run("convert", tmp_path / "weights.pth", tmp_path / "new") == 2
    assert "--model must name the architecture of FILE; got none" in capsys.readouterr().err
