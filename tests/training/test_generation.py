"""Training of generators: what is drawn, the loss, bitwise resumption, and what does not go together."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from ipt_fast.cli import main
from ipt_fast.data.latents import LatentsInfo, write_index, write_shard
from ipt_fast.diffusion import GaussianDiffusion, sample
from ipt_fast.models import create_model, open_model
from ipt_fast.training import loop
from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.config import TrainingConfig
from ipt_fast.training.distributed import World
from ipt_fast.training.loop import build_model, train
from ipt_fast.training.objectives import objective_of
from tests.training.test_loop import assert_equal_states, read_log

SIZE = 8
MICRO = {"in_channels": 3, "sample_size": SIZE, "num_classes": 2, "width": 16, "layers": 2, "heads": 2}
LATENT = {**MICRO, "in_channels": 4}
IPT_V2 = {"width": 4, "depths": (1, 2, 1), "heads": (1, 1, 1), "window_size": 4, "grid_size": 4}
IPT_V2 |= {name: LATENT[name] for name in ("in_channels", "sample_size", "num_classes")}


@pytest.fixture
def pictures(tmp_path):
    """Dark pictures of one class and bright ones of another, of several sizes."""
    generator = np.random.default_rng(0)
    for name, level in (("bright", 200), ("dark", 40)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(3):
            pixels = level + generator.integers(-30, 30, (9 + number, 12, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def latents(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values, mirrored = (torch.randn(5, 4, SIZE, SIZE, generator=generator) for _ in range(2))
    write_shard(tmp_path / "latents", 0, values, torch.tensor([0, 1, 0, 1, 1]), mirrored)
    write_index(tmp_path / "latents", LatentsInfo((4, SIZE, SIZE), ("bright", "dark"), True), [5])
    return tmp_path / "latents"


@pytest.fixture
def make_config(tmp_path):
    def make(data, out="run", **changes):
        settings = {
            **{"model": "dit_s_2", "model_config": MICRO, "task": "generate", "iterations": 6, "batch_size": 4},
            **{"lr": 1e-3, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "grad_clip": 0.0, "ema": 0.5},
            **{"log_every": 2, "save_every": 3, "device": "cpu"},
        }
        return TrainingConfig(data, tmp_path / out, **{**settings, **changes})

    return make


def objective(config):
    return objective_of(config, build_model(config), World())


def test_the_loss_is_the_hybrid_one_of_what_was_drawn(make_config, pictures):
    config = make_config(pictures)
    found, model = objective(config), build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = torch.utils.data.default_collate([found.dataset(SIZE, 4)[number] for number in range(4)])
    x_0, labels, timestep, noise = batch
    diffusion = GaussianDiffusion()
    x_t = diffusion.q_sample(x_0, timestep, noise)
    expected = diffusion.hybrid_loss(model(x_t, timestep, labels), x_0, x_t, noise, timestep).mean()
    torch.testing.assert_close(found.loss(model, batch), expected)


@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_a_run_stopped_and_resumed_has_the_same_bits(make_config, request, kind, monkeypatch):
    data = request.getfixturevalue(kind)
    changes = {"model_config": LATENT if kind == "latents" else MICRO, "val": data, "accumulate": 2}
    whole, parts = (make_config(data, out, **changes) for out in ("whole", "parts"))
    assert train(whole) == 6
    step = loop.Run.step

    def killed(run, batch):
        step(run, batch)
        if run.iteration == 4:
            raise SystemExit  # after the checkpoint at 3

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", killed)
        with pytest.raises(SystemExit):
            train(parts)
    assert train(parts, resume=True) == 6
    ends = [load_checkpoint(config.out / "checkpoint.pth") for config in (whole, parts)]
    assert_equal_states(*ends)
    rows = read_log(whole)
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_log(parts)]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]  # at 2, 3, 4 and 6
    assert all(row["lr"] == "1.000e-03" and row["psnr"] == "" for row in rows)


def test_it_learns_and_guided_samples_are_of_their_class(make_config, pictures):
    shape = {**MICRO, "sample_size": 4, "layers": 1}
    train(make_config(pictures, iterations=150, batch_size=16, lr=1e-2, ema=0.9, save_every=150, model_config=shape))
    losses = [float(row["loss"]) for row in read_log(make_config(pictures))]
    assert np.mean(losses[-10:]) < 0.3 * losses[0]
    model = open_model(make_config(pictures).out)
    labels, seeds = [0] * 8 + [1] * 8, range(16)
    plain, guided = (
        sample(model, labels, seeds=seeds, steps=20, clip=True, guidance=guidance).mean((1, 2, 3))
        for guidance in (1.0, 3.0)
    )
    assert guided[:8].mean() > 0.2 and guided[8:].mean() < -0.5  # pixels of 200 and 40 are 0.57 and -0.69
    assert guided[:8].mean() - guided[8:].mean() > plain[:8].mean() - plain[8:].mean()


def test_validation_is_the_same_each_time(make_config, pictures):
    config = make_config(pictures, val=pictures)
    found, model = objective(config), build_model(config)
    first, second = (found.validation.loss(model, torch.device("cpu")) for _ in range(2))
    # A new model predicts no noise and a variance between the bounds: the error is that of noise, 1, and a little.
    assert first == second and 0.9 < first < 1.5
    times = [example[2] for example in found.validation.examples]
    assert sorted(times)[0] == 0 and sorted(times)[-1] == 999 and len({*times}) == len(times) == 128
    assert {example[1] for example in found.validation.examples} == {0, 1}


def test_a_model_without_classes(make_config, pictures, tmp_path):
    shape = {**MICRO, "num_classes": 0}
    assert train(make_config(pictures, model_config=shape, iterations=2, val=pictures)) == 2
    assert train(make_config(pictures / "dark", out="flat", model_config=shape, iterations=1)) == 1


def test_no_variance_and_bf16(make_config, pictures):
    assert train(make_config(pictures, model_config={**MICRO, "learn_variance": False}, iterations=2, amp="bf16")) == 2


def test_stages_of_batches(make_config, pictures):
    assert train(make_config(pictures, iterations=(2, 1), batch_size=(4, 2))) == 3


def test_activations_computed_again_change_nothing(make_config, latents):
    settings = {"model": "latent_ipt_v2_s", "model_config": IPT_V2}
    configs = [make_config(latents, str(again), **settings, activation_checkpointing=again) for again in (False, True)]
    for config in configs:
        assert train(config) == 6
    assert_equal_states(*(load_checkpoint(config.out / "checkpoint.pth")["model"] for config in configs))


def test_workers_change_nothing(make_config, latents):
    configs = [make_config(latents, f"{workers}", model_config=LATENT, workers=workers) for workers in (0, 2)]
    for config in configs:
        train(config)
    states = [load_checkpoint(config.out / "checkpoint.pth") for config in configs]
    assert [state.pop("config")["workers"] for state in states] == [0, 2]
    assert_equal_states(*states)


def test_the_command(make_config, pictures, tmp_path, capsys):
    options = ["--task", "generate", "--model", "dit_s_2", "--data", str(pictures), "--device", "cpu"]
    shape = '{"in_channels": 3, "sample_size": 8, "num_classes": 2, "width": 16, "layers": 1, "heads": 2}'
    options += ["--model-config", shape, "--batch-size", "4", "--iterations", "2", "--schedule", "constant"]
    assert main(["train", *options, "--no-flip", "--out", str(tmp_path / "run")]) == 0
    assert "finished 2 iterations" in capsys.readouterr().out
    recipe = tmp_path / "run" / "recipe.yml"
    text = recipe.read_text()
    assert "use_hflip: false" in text and "type: constant" in text and "task: generate" in text
    assert "sigma" not in text and "Charbonnier" not in text
    assert main(["train", "--config", str(recipe), "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    states = [load_checkpoint(tmp_path / out / "checkpoint.pth") for out in ("run", "again")]
    assert_equal_states(*states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "denoise"}, "task must be generate for DiT, a generator; got 'denoise'"),
        ({"task": {"generate": 1.0}}, "task must be generate for DiT, a generator; got {'generate': 1.0}"),
        ({"model": "ipt_v2_tiny", "model_config": {}}, "model must be a generator for task generate, .* got IPTV2"),
        ({"sigma": (0, 5)}, r"sigma must be left out for task generate; got \(0.0, 5.0\)"),
        ({"loss": "l1"}, "loss must be left out for task generate; got l1"),
        ({"shrink": 2}, r"shrink must be left out for task generate; got \(2,\)"),
        ({"patch_size": 8}, r"patch_size must be left out for task generate; got \(8,\)"),
        ({"data": ("a", "b")}, "data must be one folder for task generate; got a, b"),
        ({"data": "nowhere"}, "data must be a folder"),
        ({"model_config": LATENT}, "data must be latents, as `ipt-fast encode` writes them, for a model of 4 channels"),
        (
            {"model_config": {**MICRO, "num_classes": 1}},
            "num_classes of the model must be at least the 2 of data; got 1",
        ),
    ],
)
def test_settings_that_do_not_go_together(make_config, pictures, changes, message):
    with pytest.raises(ValueError, match=message):
        objective(dataclasses.replace(make_config(pictures), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": MICRO}, r"data must be latents of shape \(3, 8, 8\), as the model takes; got \(4, 8, 8\)"),
        ({"model_config": {**LATENT, "sample_size": 4}}, r"data must be latents of shape \(4, 4, 4\)"),
        (
            {"model_config": {**LATENT, "num_classes": 1}},
            "num_classes of the model must be at least the 2 of data; got 1",
        ),
    ],
)
def test_latents_that_do_not_go_with_the_model(make_config, latents, changes, message):
    with pytest.raises(ValueError, match=message):
        objective(make_config(latents, **changes))


def test_latents_without_mirrored_ones(make_config, tmp_path):
    write_shard(tmp_path / "plain", 0, torch.randn(2, 4, SIZE, SIZE), torch.tensor([0, 1]))
    write_index(tmp_path / "plain", LatentsInfo((4, SIZE, SIZE), ("a", "b")), [2])
    with pytest.raises(ValueError, match="flip must be False for latents without those of mirrored images; got True"):
        objective(make_config(tmp_path / "plain", model_config=LATENT))
    assert train(make_config(tmp_path / "plain", model_config=LATENT, flip=False, iterations=1)) == 1


def test_classes_of_validation_are_those_of_training(make_config, pictures):
    (pictures.parent / "held_out").mkdir()
    (pictures / "dark").rename(pictures.parent / "held_out" / "dark")
    with pytest.raises(ValueError, match="classes must hold the names of all subfolders; got none for dark"):
        objective(make_config(pictures, val=pictures.parent / "held_out"))
    (pictures / "bright").rename(pictures / "dark")
    (pictures / "cat").mkdir()
    (pictures / "dark" / "0.png").rename(pictures / "cat" / "0.png")
    found = objective(make_config(pictures, val=pictures.parent / "held_out"))
    assert {example[1] for example in found.validation.examples} == {1}  # by name, though it is alone there


def test_restoration_takes_no_flip(make_config, images):
    config = TrainingConfig(images, images.parent / "run", model="ipt_v2_tiny", flip=False)
    with pytest.raises(ValueError, match="flip must be left out for IPTV2, no generator; got False"):
        objective(config)


def test_a_trained_generator_goes_on_from_its_folder(make_config, pictures):
    first = make_config(pictures, iterations=1)
    train(first)
    second = make_config(pictures, "second", iterations=1, model=str(first.out), model_config={})
    train(second)
    assert open_model(second.out).config == create_model("dit_s_2", **MICRO).config
    third = first.out.with_name("third")
    options = ["--model", str(first.out), "--data", str(pictures), "--device", "cpu", "--iterations", "1"]
    assert main(["finetune", *options, "--batch-size", "2", "--out", str(third)]) == 0
    assert load_checkpoint(third / "checkpoint.pth")["config"]["lr"] == 2e-5
