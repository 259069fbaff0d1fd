import argparse
import json
import os
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

import ipt_fast
import ipt_fast.cli
from ipt_fast.cli import train as command
from ipt_fast.training import loop
from ipt_fast.training.config import TrainingConfig

MICRO = json.dumps({"width": 8, "depths": [2, 0, 0, 0], "window_size": 8, "grid_size": 4})


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a run of two updates on one synthetic image."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "x.png")
    return [
        "train", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run"), "--model", "ipt_v2_tiny",
        "--model-config", MICRO, "--task", "denoise", "--sigma", "5", "50", "--iterations", "2", "--patch", "16",
        "--batch-size", "1", "--log-every", "1", "--save-every", "1", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def main():
    """The subcommand behind a bare parser, so that errors reach the test."""

    def call(arguments):
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers())
        args = parser.parse_args(arguments)
        return args.run(args)

    return call


def test_train_then_open_the_model(main, arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert "finished 2 iterations" in capsys.readouterr().out
    model = ipt_fast.models.open_model(tmp_path / "run")
    assert model.config.depths == (2, 0, 0, 0)
    assert model(torch.rand(1, 3, 9, 7)).shape == (1, 3, 9, 7)
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 3


def test_stop_and_resume(main, arguments, tmp_path, monkeypatch, capsys):
    step = loop.Run.step

    def stopping(run, *batch):
        step(run, *batch)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", stopping)
        assert main(arguments) == 130
    assert "after 1 of 2 iterations; --resume continues" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lr must be 0.0003, as in the run to resume"):
        main([*arguments, "--resume", "--lr", "0.01"])
    assert main([*arguments, "--resume"]) == 0


def test_divergence_is_one_sentence(main, arguments, monkeypatch):
    step = loop.Run.step
    monkeypatch.setattr(loop.Run, "step", lambda run, batch: step(run, [batch[0] / 0, batch[1]]))
    with pytest.raises(ValueError, match="training diverged"):
        main(arguments)


def test_every_setting_is_an_option_with_the_same_default(arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = vars(parser.parse_args(["train", "--data", "images", "--out", "run"]))
    config = TrainingConfig("images", "run")
    args["patch_size"] = args["patch"]
    for entry in fields(TrainingConfig):
        value = args[entry.name]
        assert (tuple(value) if isinstance(value, list) else value) == getattr(config, entry.name), entry.name


def test_threads(main, arguments):
    before = torch.get_num_threads()
    try:
        assert main([*arguments, "--threads", "3"]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "option, message",
    [
        (["--threads", "0"], "threads"),
        (["--patch", "25"], "patch_size must be at most 24 for denoise, by the largest image; got 25"),
        (["--patch", "8", "16"], "one value for each stage"),
        (["--data", "nowhere"], "data must be a folder or a .tar file; got nowhere"),
        (["--model", "no_such_model"], "no_such_model"),
        (["--model-config", '{"widht": 8}'], "widht"),
        (["--resume"], "must be a file of a training run to resume"),
    ],
)
def test_bad_input_is_a_value_error_and_writes_nothing(main, arguments, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        main([*arguments, *option])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [["--model-config", "width=8"], ["--model-config", "[8]"], ["--loss", "l3"]])
def test_malformed_options_end_in_usage(main, arguments, option):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *option])
    assert stopped.value.code == 2


def test_broken_images_are_skipped_while_there_are_others(arguments, tmp_path, capsys):
    (tmp_path / "images" / "broken.jpg").write_bytes(b"not a picture")
    assert ipt_fast.cli.main(arguments) == 0
    assert capsys.readouterr().err.count("broken.jpg") == 1
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"not a picture")
    arguments[arguments.index("--out") + 1] = str(tmp_path / "other")
    assert ipt_fast.cli.main(arguments) == 2
    assert "data must hold an image that can be used; got none: cannot read image" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
