"""Pre-training of an IPT on several tasks, on one process and on two, and fine-tuning of one task."""

import os
import signal
import subprocess
import sys

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.models import open_model
from ipt_fast.training import loop
from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.loop import learning_rate, train
from tests.training.test_loop import assert_equal_states, read_log, stop_after, without_times  # noqa: F401, a fixture

TINY = {
    "tasks": ("sr_x2", "derain", "denoise30"),
    "image_size": 12,
    "patch_size": 3,
    "features": 4,
    "layers": 1,
    "heads": 3,
}
FIELDS = {"model": "ipt", "model_config": TINY, "patch_size": None, "contrastive": 0.1, "loss": "l1", "batch_size": 4}


@pytest.fixture
def make(make_config):
    return lambda out="run", **changes: make_config(out, **{**FIELDS, **changes})


def test_resume_is_exact(make, images, stop_after, monkeypatch):  # noqa: F811
    whole, parts = make("whole", val=images), make("parts", val=images)
    assert train(whole) == 6
    stop_after(4, signal.SIGTERM)
    assert train(parts) == 4
    monkeypatch.undo()
    assert train(parts, resume=True) == 6
    assert_equal_states(load_checkpoint(whole.out / "checkpoint.pth"), load_checkpoint(parts.out / "checkpoint.pth"))
    assert without_times(read_log(whole)) == without_times(read_log(parts))
    assert len(open_model(whole.out).config.tasks) == 3


def test_the_loss_is_that_of_the_paper(make):
    """Eq. 6 in the model's range of values, of the one task of the batch."""
    config = make(contrastive=0.5)
    run = loop.Run(config, resume=False)
    batch = next(loop.batches(config, run.objective, 0, run.world))
    degraded, clean, task = batch
    name = TINY["tasks"][task[0]]
    output, features = run.model.forward_with_features(255 * degraded, name)
    expected = (output - 255 * clean).abs().mean() + 0.5 * loop_contrastive(features)
    assert abs(run.objective.loss(run.model, batch).item() - expected.item()) < 1e-3
    alone = loop.Run(make("alone", contrastive=0.0), resume=False)
    expected = (alone.model(255 * degraded, name) - 255 * clean).abs().mean()
    assert abs(alone.objective.loss(alone.model, batch).item() - expected.item()) < 1e-4


def loop_contrastive(features):
    from tests.training.test_losses import contrastive_by_loops

    return contrastive_by_loops(features)


def test_only_the_task_of_the_batch_and_the_body_change(make):
    config = make(iterations=1, weight_decay=0.0)
    run = loop.Run(config, resume=False)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    batch = next(loop.batches(config, run.objective, 0, run.world))
    run.step(batch)
    task = int(batch[2][0])
    for name, value in run.model.state_dict().items():
        part, number = name.split(".")[:2]
        changes = not name.startswith(("sub_mean", "add_mean")) and "position_ids" not in name
        if part in ("head", "tail"):
            changes = int(number) == task
        assert torch.equal(value, before[name]) != changes or not value.is_floating_point(), name


def test_it_learns(make, images):
    config = make(iterations=60, contrastive=0.0, lr=2e-3, warmup=0, log_every=10, save_every=60, ema=0.9, val=images)
    train(config)
    losses = [float(row["loss"]) for row in read_log(config)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("amp", ["bf16"])
def test_mixed_precision(make, amp):
    config = make(amp=amp, iterations=3)
    train(config)
    assert all(value.isfinite().all() for value in load_file(config.out / "model.safetensors").values())


def test_two_processes_are_one(make, images, tmp_path):
    """Each gets half of every batch: the same losses and weights as one process with the whole."""
    alone = make("alone", log_every=1)
    train(alone)
    options = [
        *("--model", "ipt", "--model-config", '{"tasks": ["sr_x2", "derain", "denoise30"], "image_size": 12,'),
        *("--contrastive", "0.1", "--loss", "l1", "--batch-size", "4", "--iterations", "6", "--warmup", "2"),
        *("--log-every", "1", "--save-every", "3", "--ema", "0.5", "--device", "cpu"),
    ]
    options[3] += ' "patch_size": 3, "features": 4, "layers": 1, "heads": 3}'
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "ipt_fast.cli", "train", "--data", images, "--out", tmp_path / "both", *options]
    result = subprocess.run(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("finished 6 iterations") == 1
    both = make("both", log_every=1)
    for one, two in zip(read_log(alone), read_log(both), strict=True):
        assert abs(float(one["loss"]) - float(two["loss"])) < 2e-4 * float(one["loss"])
    # Means of the gradients; without the other process's half they would differ by a fifth of their size. Adam moves
    # weights almost without a gradient as rounding has it, and what follows differs by up to a thousandth.
    states = [load_checkpoint(config.out / "checkpoint.pth")["optimizer"]["state"] for config in (alone, both)]
    one, two = (torch.cat([entry["exp_avg"].flatten() for entry in state.values()]) for state in states)
    assert (one - two).norm() < 2e-2 * one.norm()


def test_a_batch_that_processes_cannot_share(make):
    from ipt_fast.training.distributed import World

    assert list(World(1, 2).share(6)) == [3, 4, 5]
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes; got 4"):
        World(0, 3).share(4)


def test_fine_tuning_keeps_one_task(make, images, tmp_path):
    pretrained = make("pretrained", iterations=3)
    train(pretrained)
    arguments = ["finetune", "--model", str(pretrained.out), "--task", "derain", "--data", str(images)]
    arguments += ["--out", str(tmp_path / "tuned"), "--iterations", "2", "--batch-size", "2", "--warmup", "0"]
    assert main([*arguments, "--lr", "0", "--lr-min", "0"]) == 0
    tuned, whole = open_model(tmp_path / "tuned"), open_model(pretrained.out)
    assert tuned.config.tasks == ("derain",)
    x = torch.rand(2, 3, 12, 12) * 255
    assert torch.equal(tuned(x), whole(x, "derain"))
    assert main([*arguments, "--resume", "--lr", "0", "--lr-min", "0"]) == 0
    for wrong in (["--model", "ipt_tiny"], ["--model", str(images)]):
        assert main(["finetune", "--data", str(images), "--out", str(tmp_path / "no"), *wrong]) == 2
    assert main(["finetune", "--data", str(images), "--out", str(tmp_path / "no")]) == 2
    several = ["--model", str(pretrained.out), "--data", str(images), "--out", str(tmp_path / "no")]
    assert main(["finetune", *several]) == 2  # no --task
    assert not (tmp_path / "no").exists()
    assert main([*arguments[:-8], "--out", str(tmp_path / "no"), "--task", "dehaze"]) == 2


def test_fine_tuning_the_model_that_ships(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = torch.randint(0, 256, (60, 70, 3), dtype=torch.uint8).numpy()
    PIL.Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    paths = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]
    settings = ["--iterations", "1", "--batch-size", "1", "--lr", "1e-8", "--lr-min", "0"]
    assert main(["finetune", "--model", "ipt_tiny", "--task", "derain", *paths, *settings]) == 0
    found, shipped = open_model(tmp_path / "run"), open_model("ipt_tiny").only("derain")
    assert found.config == shipped.config
    for name, value in shipped.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-6)


def test_the_published_schedule(make):
    config = make(iterations=300, lr=5e-5, lr_min=2e-5, warmup=0, schedule="step")
    assert [learning_rate(config, i) for i in (0, 199, 200, 299)] == [5e-5, 5e-5, 2e-5, 2e-5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "patch_size must be 12, the model's image_size, or left out"),
        ({"batch_size": 1}, "batch_size must be at least 2 for the contrastive loss"),
        ({"model_config": {**TINY, "tasks": ("denoise30", "dehaze")}}, "task must be sr_x<n>, derain, denoise"),
        (
            {"model_config": {**TINY, "tasks": ("derain", "sr_x4")}},
            "patch_size must be at most 10 for sr_x4, by the largest image; got 12",
        ),
        (
            {"model": "ipt_v2_tiny", "model_config": {}, "task": "haze", "contrastive": 0.0},
            "task must be sr_x<n>, derain",
        ),
        ({"model": "ipt_v2_tiny", "model_config": {}}, "contrastive must be 0 for IPTV2"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step"),
        ({"contrastive": -1.0}, "contrastive must be in"),
    ],
)
def test_bad_settings(make, changes, message):
    with pytest.raises(ValueError, match=message):
        train(make(**changes))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_skipped(make, images, workers):
    for path in sorted(images.iterdir())[1:]:
        path.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"skipped 2 of the images: .*1\.png: it must be one of PNG.*; .*2\.png: it"):
        assert train(make(workers=workers)) == 6
    for path in images.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^data must hold an image that can be used; got none: cannot read image "):
        train(make("none", workers=workers))


def test_ablations_train(make):
    for name, changes in (("task", {"task_embedding": False}), ("positions", {"no_pos": True})):
        config = make(name, model_config={**TINY, **changes}, iterations=2)
        assert train(config) == 2
    assert isinstance(ipt_fast.create_model("ipt_tiny"), ipt_fast.models.IPT)
