"""Weights of files that hold an average over training, too: which are taken, and that it is said."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.models import IPT, open_checkpoint, open_model, read_state_dict, record
from ipt_fast.models.checkpoint import AVERAGES
from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.loop import train
from tests.training.test_loop import assert_equal_states
from tests.training.test_pretraining import FIELDS, TINY

CONFIG = '{"width": 8, "depths": [2, 0, 0, 0], "window_size": 8, "grid_size": 4}'


@pytest.fixture
def run(make_config):
    """A run's folder; its averaged and its last weights differ."""
    config = make_config(lr=1e-2, iterations=3)
    train(config)
    return config.out


def test_convert_takes_the_average_of_a_run_and_says_so(run, tmp_path, capsys):
    convert = ["convert", str(run / "checkpoint.pth"), "--model", "ipt_v2_tiny", "--model-config", CONFIG]
    assert main([*convert, str(tmp_path / "average")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ipt-fast: warning: took the averaged weights (average) of") and "(model)" in line
    assert_equal_states(load_file(tmp_path / "average/model.safetensors"), load_file(run / "model.safetensors"))
    assert main([*convert, str(tmp_path / "raw"), "--raw-weights"]) == 0
    assert not capsys.readouterr().err
    raw = load_file(tmp_path / "raw/model.safetensors")
    assert raw.pop(record.NAME).dtype == torch.int32
    assert_equal_states(raw, load_checkpoint(run / "checkpoint.pth")["model"])
    assert any(not torch.equal(raw[name], value) for name, value in load_file(run / "model.safetensors").items())


def test_restore_takes_the_average_of_a_run(images, tmp_path, capsys):
    model, other = (ipt_fast.create_model("ipt_v2_tiny", pretrained=True) for _ in range(2))
    with torch.no_grad():
        other.output.weight.zero_()
    average = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": other.state_dict(), "average": average, "iteration": 3}, tmp_path / "checkpoint.pth")
    restore = ["restore", str(images / "0.png"), "--device", "cpu", "--dtype", "float32"]
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint.pth")]
    assert main([*restore, str(tmp_path / "plain.png")]) == 0
    capsys.readouterr()
    assert main([*restore, str(tmp_path / "average.png"), *checkpoint]) == 0
    assert "took the averaged weights (average)" in capsys.readouterr().err
    assert main([*restore, str(tmp_path / "raw.png"), *checkpoint, "--raw-weights"]) == 0
    assert not capsys.readouterr().err
    plain, averaged, raw = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "average", "raw"))
    assert plain == averaged != raw
    assert main([*restore, str(tmp_path / "no.png"), "--raw-weights"]) == 2
    assert "--raw-weights must be left out without --checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("others", ["params", "state_dict", "model", "net"])
def test_the_average_by_any_name(tmp_path, name, others):
    path = tmp_path / "file.pth"
    torch.save({"epoch": 3, others: {"a": torch.zeros(2)}, name: {"module.a": torch.ones(2)}}, path)
    with pytest.warns(UserWarning, match=rf"took the averaged weights \({name}\) of .*file.pth.*\({others}\)"):
        assert read_state_dict(path)["a"].tolist() == [1, 1]
    with warnings.catch_warnings(action="error"):
        assert read_state_dict(path, average=True)["a"].tolist() == [1, 1]
        assert read_state_dict(path, average=False)["a"].tolist() == [0, 0]


def test_files_with_one_kind_of_weights(tmp_path):
    for name in ("params", "params_ema"):
        torch.save({name: {"a": torch.zeros(2)}}, tmp_path / f"{name}.pth")
    with warnings.catch_warnings(action="error"):
        assert read_state_dict(tmp_path / "params.pth") and read_state_dict(tmp_path / "params_ema.pth")
        assert read_state_dict(tmp_path / "params.pth", average=False)
    with pytest.raises(ValueError, match="path must hold averaged weights; got .*params.pth, which holds none"):
        read_state_dict(tmp_path / "params.pth", average=True)
    with pytest.raises(ValueError, match="path must hold weights of the last iteration; got .*which holds params_ema"):
        read_state_dict(tmp_path / "params_ema.pth", average=False)


def test_every_way_to_open_a_file(make_config):
    config = make_config(**FIELDS, lr=1e-2, iterations=2)
    train(config)
    path, raw = config.out / "checkpoint.pth", load_checkpoint(config.out / "checkpoint.pth")["model"]
    shape = {"heads": 3, "tasks": TINY["tasks"]}
    for average, expected in ((True, open_model(config.out).state_dict()), (False, raw)):
        opened = [
            open_checkpoint(path, "ipt", average=average, **shape),
            IPT.from_checkpoint(path, average=average, **shape),
            ipt_fast.load_checkpoint(ipt_fast.create_model("ipt", **TINY), path, average=average),
        ]
        for model in opened:
            assert_equal_states(dict(model.state_dict()), dict(expected))
