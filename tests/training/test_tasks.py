"""Every task through the whole of training: batches, loss, validation, and what does not go together."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from ipt_fast.cli import main
from ipt_fast.data.degradations import DEGRADATIONS, degrade, target_of
from ipt_fast.models import open_model
from ipt_fast.training.config import TrainingConfig
from ipt_fast.training.loop import build_model, train
from ipt_fast.training.objectives import objective_of
from tests.training.conftest import MICRO
from tests.training.test_pretraining import FIELDS, TINY

SAME_SIZE = [kind for kind in DEGRADATIONS if kind not in ("sr_x", "dual_pixel_deblur")]
TWO_VIEWS = {**MICRO, "in_channels": 6}
GRAY = {**MICRO, "in_channels": 1, "out_channels": 1}


def objective(config):
    from ipt_fast.training.distributed import World

    return objective_of(config, build_model(config), World())


@pytest.fixture
def pairs(images, tmp_path):
    """Inputs of one and two views beside the images."""
    generator = np.random.default_rng(0)
    for path in images.iterdir():
        clean = np.array(Image.open(path)).astype(int)
        for folder in ("input", "right"):
            (tmp_path / folder).mkdir(exist_ok=True)
            noisy = (clean + generator.normal(0, 25, clean.shape)).clip(0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / folder / path.name)
    return tmp_path


@pytest.mark.parametrize("task", [*SAME_SIZE, "denoise30", "jpeg10", "dual_pixel_deblur"])
def test_every_task_trains_and_validates(make_config, images, task):
    shape = TWO_VIEWS if task == "dual_pixel_deblur" else MICRO
    config = make_config(task=task, iterations=2, save_every=2, val=images, model_config=shape)
    assert train(config) == 2
    with (config.out / "log.csv").open() as file:
        assert 0 < float(list(csv.DictReader(file))[-1]["psnr"]) < 60
    assert open_model(config.out).config.in_channels == shape.get("in_channels", 3)


def test_a_gray_model(make_config, images):
    for task in ("gray_denoise", "camera", "derain"):
        assert train(make_config(task, task=task, iterations=1, model_config=GRAY, val=images)) == 1


def test_a_mixture(make_config, images):
    task = {"denoise": 2.0, "gray_denoise": 1.0, "jpeg30": 1.0}
    config = make_config(task=task, val=images)
    found = objective(config)
    assert {example[0] for example in found.validation.examples} == set(task)
    for name, _, clean in found.validation.examples:
        torch.testing.assert_close(clean, target_of(clean, name))
    expected = [-10 * np.log10(np.mean((d.clamp(0, 1) - c).square().numpy())) for _, d, c in found.validation.examples]
    assert abs(found.validation.psnr(torch.nn.Identity(), torch.device("cpu")) - np.mean(expected)) < 1e-3
    assert train(config) == 6
    assert train(config, resume=True) == 6


def test_the_validation_is_that_of_the_task(make_config, images):
    for task, sigma in (("denoise", 40.0), ("luma_denoise", 40.0)):
        found = objective(make_config(task=task, val=images, val_sigma=sigma))
        errors = [(degraded - clean).std().item() * 255 for degraded, clean in found.validation.pairs]
        assert abs(np.mean(errors) - 40) < 4
    found = objective(make_config(task="derain", val=images))
    for number, (degraded, clean) in enumerate(found.validation.pairs):
        assert torch.equal(degraded, degrade(clean, "derain", torch.Generator().manual_seed(number)))


def test_pairs_train_and_validate(make_config, images, pairs):
    folders = {"target": images, "val": pairs / "input", "val_target": images}
    config = TrainingConfig(**{**vars(make_config(**folders)), "data": pairs / "input"})
    found = objective(config)
    assert abs(found.validation.psnr(torch.nn.Identity(), torch.device("cpu")) - 20.3) < 1  # noise of 25
    assert train(config) == 6
    assert train(config, resume=True) == 6
    two = {"data": (pairs / "input", pairs / "right"), "val": (pairs / "input", pairs / "right"), "out": pairs / "two"}
    config = TrainingConfig(**{**vars(config), **two, "model_config": TWO_VIEWS})
    assert objective(config).validation.pairs[0][0].shape[0] == 6 and train(config) == 6


def test_pairs_for_a_task_of_a_model_with_several(make_config, images, pairs):
    config = make_config(**FIELDS | {"task": "derain", "target": images})
    config = TrainingConfig(**{**vars(config), "data": pairs / "input"})
    assert train(config) == 6 and open_model(config.out).config.tasks == ("derain",)
    with pytest.raises(ValueError, match="task must be the one that the pairs are for; got sr_x2, derain, denoise30"):
        train(TrainingConfig(**{**vars(config), "task": None, "out": pairs / "all"}))


def test_a_mixture_of_a_model_with_several_tasks(make_config, images):
    config = make_config(**FIELDS | {"task": {"denoise30": 1.0, "sr_x2": 3.0}})
    found = objective(config)
    assert found.tasks == {"sr_x2": 3.0, "denoise30": 1.0}  # in the model's order
    drawn = [found.dataset(12, 1)[number][2] for number in range(200)]
    assert 120 < drawn.count(0) < 180
    assert train(config) == 6 and open_model(config.out).config.tasks == TINY["tasks"]
    with pytest.raises(ValueError, match="task must be of sr_x2, derain, denoise30; got dehaze"):
        train(make_config("other", **FIELDS | {"task": {"dehaze": 1.0}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "dual_pixel_deblur"}, "in_channels must be 6 for dual_pixel_deblur, made of clean images; got 3"),
        ({"model_config": TWO_VIEWS}, "in_channels must be 3 for denoise, made of clean images; got 6"),
        ({"task": "sr_x2"}, "task must magnify 1 times, as the model does; got sr_x2"),
        ({"task": "derain", "sigma": (5, 30)}, "sigma must be left out where no task is denoise, of derain"),
        ({"task": "derain", "val_sigma": 30.0, "val": "."}, "val_sigma must be left out"),
        ({"task": {"denoise": 0.0}}, "task must have weights of which one is positive"),
        ({"task": {"denoise": -1.0}}, "task must be in"),
        ({"val_target": "x"}, "val_target must be the folder of targets of val"),
        ({"target": ("a", "b")}, "target must be one folder for each of data, or for each two of them; got 2 for 1"),
        ({"shrink": (1, 2)}, "shrink must have one value for each of 1 sources"),
        ({"shrink": 0}, "shrink must be at least 1"),
        ({"data_weights": (1, 2)}, "data_weights must have one value for each of 1 sources"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
    ],
)
def test_settings_that_do_not_go_together(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(**changes))


def test_sources_of_a_run():
    def of(**settings):
        found = TrainingConfig(out="out", **settings).sources
        return [([str(path) for path in folders], target and str(target), times) for folders, target, times in found]

    assert of(data="a") == [(["a"], None, 1)]
    assert of(data=["a", "b"], shrink=(2, 1)) == [(["a"], None, 2), (["b"], None, 1)]
    assert of(data=["a", "b"], target="t") == [(["a", "b"], "t", 1)]
    assert of(data=["a", "b"], target=["s", "t"]) == [(["a"], "s", 1), (["b"], "t", 1)]
    assert of(data=["a", "b"], target=[None, "t"], shrink=[2, 1]) == [(["a"], None, 2), (["b"], "t", 1)]
    with pytest.raises(ValueError, match="target must be one folder for each of data"):
        of(data=["a", "b", "c"], target=["s", "t"])


def test_the_command_line(images, pairs, tmp_path, capsys):
    shape = '{"width": 8, "depths": [2, 0, 0, 0], "window_size": 8, "grid_size": 4}'
    short = ["--model-config", shape, "--iterations", "2", "--patch", "16", "--batch-size", "2", "--device", "cpu"]

    def run(out, *options):
        return main(["train", "--out", str(tmp_path / out), *short, *options])

    data = [str(images), str(pairs / "input")]
    assert (
        run("a", "--data", *data, "--task", "denoise=3", "jpeg", "--shrink", "1", "2", "--data-weights", "2", "1") == 0
    )
    assert run("b", "--data", data[1], "--target", data[0], "--val", data[1], "--val-target", data[0]) == 0
    assert run("c", "--data", data[0], "--task", "derain", "--betas", "0.8", "0.9") == 0
    capsys.readouterr()
    assert run("d", "--data", data[0], "--task", "dehaze") == 2
    assert "task must be sr_x<n>, derain" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "a"), "--resume"]) == 0
    assert main(["train", "--out", str(tmp_path / "a"), "--resume", "--task", "denoise=3", "jpeg=2"]) == 2
    assert "task must be {'denoise': 3.0, 'jpeg': 1.0}, as in the run to resume" in capsys.readouterr().err


def test_what_is_skipped_in_the_middle_is_named_once(make_config, images, monkeypatch):
    from ipt_fast.training import objectives

    monkeypatch.setattr(objectives, "MEMORY_BUDGET", 0)
    path = images / "1.png"
    path.write_bytes(path.read_bytes()[:-100])
    lines: list[str] = []
    for workers in (0, 1):
        with pytest.warns(UserWarning) as warned:
            assert train(make_config(f"run{workers}", iterations=8, workers=workers), say=lines.append) == 8
        named = [str(each.message) for each in warned if "1.png" in str(each.message)]
        assert len(named) == 1 and named[0].startswith("skipped 1 of the images: cannot read image ")
        assert lines[-1].endswith("; 1 images that could not be used were skipped")
        with (images.parent / f"run{workers}" / "log.csv").open() as file:
            assert [row["skipped"] for row in csv.DictReader(file)][-1] == "1"


def test_a_task_beside_nothing_but_pairs_is_refused(make_config, pairs):
    """It would say what is made of clean images, of which there are none."""
    settings = vars(make_config()) | {"data": pairs / "input", "target": pairs / "images", "iterations": 1}
    assert train(TrainingConfig(**settings)) == 1
    with pytest.raises(ValueError, match="task must be left out where all data are pairs, .*; got 'jpeg'"):
        train(TrainingConfig(**settings | {"task": "jpeg", "out": pairs / "no"}))
