"""Resuming a run by its folder alone: what must agree, and what may have changed."""

import dataclasses
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ipt_fast.cli import main
from ipt_fast.models import create_model, open_model
from ipt_fast.training import loop, run
from ipt_fast.training.checkpoint import load_checkpoint, save_checkpoint
from ipt_fast.training.loop import train
from tests.training.conftest import MICRO
from tests.training.test_loop import assert_equal_states, read_log
from tests.training.test_pretraining import FIELDS, TINY


@pytest.fixture
def stopped(make_config, monkeypatch):
    """A run of the command line that was stopped after 3 of 6 iterations: its folder, and its options but --out."""

    def make(*options):
        config = make_config()
        step = loop.Run.step

        def stopping(run, batch):
            step(run, batch)
            if run.iteration == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        data = [
            "--data",
            str(config.data),
            "--patch",
            "16",
            "--batch-size",
            "2",
            "--iterations",
            "6",
            "--device",
            "cpu",
        ]
        model = ["--model-config", '{"width": 8, "depths": [2, 0, 0, 0], "window_size": 8, "grid_size": 4}']
        arguments = [*data, *(options or model), "--warmup", "2", "--sigma", "10", "40", "--threads", "1"]
        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "step", stopping)
            assert main(["train", *arguments, "--out", str(config.out)]) == 130
        return config.out, arguments

    before = torch.get_num_threads()
    yield make
    torch.set_num_threads(before)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_out_is_enough_to_resume(stopped, tmp_path, monkeypatch, capsys, command):
    out, arguments = stopped()
    whole = tmp_path / "whole"
    assert main(["train", *arguments, "--out", str(whole)]) == 0
    monkeypatch.chdir("/")
    torch.set_num_threads(2)
    with monkeypatch.context() as patch:
        patch.chdir(out.parent)
        assert main([command, "--out", out.name, "--resume"]) == 0
    assert torch.get_num_threads() == 1  # as it began
    ends = [load_checkpoint(folder / "checkpoint.pth") for folder in (whole, out)]
    assert_equal_states(*ends)
    assert "finished 6 iterations" in capsys.readouterr().out


def test_relative_paths_hold_from_anywhere(stopped, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    saved = create_model("ipt_v2_tiny", **MICRO)
    saved.save_pretrained("saved")
    out, _ = stopped("--model", "saved", "--data", images.name)
    monkeypatch.chdir("/")
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--data", str(images), "--model", f"{tmp_path}/saved"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--data", images.name]) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--lr", "0.01"], "lr must be 0.0003, as in the run to resume; got 0.01"),
        (["--sigma", "5", "50"], "sigma must be (10.0, 40.0), as in the run to resume; got (5.0, 50.0)"),
        (["--patch", "24"], "patch_size must be (16,)"),
        (["--task", "denoise"], "task must be None"),
        (["--model", "ipt_tiny"], "model must be 'ipt_v2_tiny'"),
        (["--model-config", '{"width": 16}'], "model_config must be {"),
        (["--data", "/nowhere"], "data must be a folder or a .tar file; got /nowhere"),
        (["--warmup", "500"], "warmup must be 2"),  # the default, but given
        (["--device", "meta"], "device must be usable; got meta"),
        (["--val", "/nowhere"], "data must be a folder or a .tar file; got /nowhere"),
    ],
)
def test_options_given_again_must_agree(stopped, capsys, error_of_command, option, message):
    out, arguments = stopped()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", *option]) == 2
    assert message in error_of_command()
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["train", *arguments, "--out", str(out), "--resume", "--save-every", "2", "--device", "cpu"]) == 0


def test_a_new_run_needs_data(tmp_path, error_of_command):
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    assert error_of_command() == "ipt-fast: error: --data must be a folder of clean images; got none"
    assert not (tmp_path / "run").exists()


def test_resuming_without_the_folder_of_the_model(make_config, tmp_path, monkeypatch, capsys):
    create_model("ipt", **TINY).save_pretrained(tmp_path / "pretrained")
    config, step = make_config(), loop.Run.step
    options = ["--model", str(tmp_path / "pretrained"), "--task", "derain", "--data", str(config.data)]
    options += ["--iterations", "4", "--batch-size", "2", "--out", str(config.out)]

    def stopping(run, batch):
        step(run, batch)
        if run.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", stopping)
        assert main(["finetune", *options]) == 130
    (tmp_path / "pretrained").rename(tmp_path / "gone")
    assert main(["finetune", "--out", str(config.out), "--resume", "--model", str(tmp_path / "other")]) == 2
    assert "model must be '" in capsys.readouterr().err
    assert main(["finetune", *options, "--resume"]) == 0
    assert open_model(config.out).config.tasks == ("derain",)
    (tmp_path / "gone").rename(tmp_path / "pretrained")
    capsys.readouterr()
    assert main(["finetune", *options, "--resume", "--task", "sr_x2"]) == 2
    assert "task must be 'derain', as in the run to resume; got 'sr_x2'" in capsys.readouterr().err


def test_a_model_that_is_not_registered_any_more(make_config, monkeypatch):
    config = make_config()
    train(config)
    monkeypatch.setattr(run, "CLASSES", {"IPT": None})
    with pytest.raises(ValueError, match="model in the checkpoint must be one of IPT; got IPTV2"):
        train(config, resume=True)


def test_data_and_models_by_another_way(make_config, images, tmp_path):
    """Data that moved are the same still; those of another place need not be, and then the run warns."""
    create_model("ipt_v2_tiny", **MICRO).save_pretrained(tmp_path / "saved")
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    config = make_config(model=str(tmp_path / "link"), model_config={})
    assert train(config) == 6
    images.rename(tmp_path / "moved")
    options = ["--out", str(config.out), "--resume", "--model", str(tmp_path / "saved"), "--data"]
    with warnings.catch_warnings(action="error"):
        assert main(["train", *options, str(tmp_path / "moved")]) == 0
    (tmp_path / "moved" / "2.png").unlink()
    with pytest.warns(UserWarning, match="data have changed .*3 images then, 2 now"):
        train(dataclasses.replace(config, data=tmp_path / "moved"), resume=True)


@pytest.mark.parametrize("changes", [{}, FIELDS])
def test_changed_data_are_noticed(make_config, images, monkeypatch, changes):
    config = make_config(**changes)
    step = loop.Run.step

    def stopping(run, batch):
        step(run, batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "step", stopping)
    assert train(config) == 1
    with warnings.catch_warnings(action="error"):
        assert train(config, resume=True) == 2
    (images / "2.png").rename(images / "3.png")
    with pytest.warns(UserWarning, match="data have changed .*3 images as then, but of other names or sizes.*goes on"):
        assert train(config, resume=True) == 3
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(images / "4.png")
    with pytest.warns(UserWarning, match="data have changed .*3 images then, 4 now"):
        assert train(config, resume=True) == 4
    with warnings.catch_warnings(action="error"):
        assert train(config, resume=True) == 5
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(images / "4.png")
    with pytest.warns(UserWarning, match="4 images as then, but of other names or sizes"):
        assert train(config, resume=True) == 6


def test_a_checkpoint_of_an_older_version(make_config, monkeypatch):
    """It knows neither how steps are carried out nor norms of gradients."""
    whole, config = make_config("whole"), make_config()
    train(whole)
    train(dataclasses.replace(config, iterations=3, save_every=3))
    state = load_checkpoint(config.out / "checkpoint.pth")
    del state["norm_sum"]
    for name in ("accumulate", "activation_checkpointing", "strategy", "tensorboard"):
        del state["config"][name]
    state["config"]["iterations"] = whole.to_dict()["iterations"]
    save_checkpoint(config.out / "checkpoint.pth", state)
    log = (config.out / "log.csv").read_text().splitlines()
    (config.out / "log.csv").write_text("".join(",".join(row.split(",")[:5]) + "\r\n" for row in log))
    assert main(["train", "--out", str(config.out), "--resume"]) == 0
    rows, expected = read_log(config), read_log(whole)
    assert [row["iteration"] for row in rows] == ["2", "3", "4", "6"] and rows[0]["grad_norm"] == ""
    assert rows[3]["grad_norm"] == expected[3]["grad_norm"]


def test_a_row_of_the_log_that_was_written_in_part(make_config):
    config = make_config()
    train(config)
    with (config.out / "log.csv").open("a") as file:
        file.write("5,0.1")
    train(config, resume=True)
    assert [row["iteration"] for row in read_log(config)] == ["2", "3", "4", "6"]
