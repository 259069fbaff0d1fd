import csv
import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ipt_fast
from ipt_fast.models import record
from ipt_fast.training import loop
from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.loop import batches, learning_rate, train


def read_log(config):
    with (config.out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


TIMES = ("seconds", "images_per_second", "data_wait", "peak_memory_mb")


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_equal_states(first, second):
    """Nested containers of tensors and plain values are bitwise equal."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds", "out"}:
            assert_equal_states(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            assert_equal_states(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.fixture
def stop_after(monkeypatch):
    """Send this process a signal after so many updates."""
    step, handlers = loop.Run.step, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def arrange(iterations, number=signal.SIGINT):
        def stopping(run, *batch):
            step(run, *batch)
            if run.iteration == iterations:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(loop.Run, "step", stopping)

    yield arrange
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers  # given back


@pytest.mark.parametrize("stop, number", [(1, signal.SIGINT), (3, signal.SIGTERM), (4, signal.SIGINT)])
def test_resume_is_exact(make_config, images, stop_after, monkeypatch, stop, number):
    staged = {"iterations": (2, 4), "patch_size": (16, 24), "batch_size": (3, 1), "val": images}
    whole, parts = make_config("whole", **staged), make_config("parts", **staged)
    assert train(whole) == 6
    with monkeypatch.context():
        stop_after(stop, number)
        assert train(parts) == stop
    assert load_checkpoint(parts.out / "checkpoint.pth")["iteration"] == stop
    assert train(parts, resume=True) == 6

    assert_equal_states(load_checkpoint(whole.out / "checkpoint.pth"), load_checkpoint(parts.out / "checkpoint.pth"))
    assert_equal_states(load_file(whole.out / "model.safetensors"), load_file(parts.out / "model.safetensors"))
    rows = without_times(read_log(parts))
    assert [row["iteration"] for row in rows] == ["2", "3", "4", "6"]
    assert rows == without_times(read_log(whole))


def test_a_killed_run_repeats_no_row_of_the_log(make_config, monkeypatch):
    config = make_config(log_every=1)
    step = loop.Run.step

    def killed(run, *batch):
        step(run, *batch)
        if run.iteration == 5:
            raise SystemExit  # after logging 4, with the last checkpoint at 3

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", killed)
        with pytest.raises(SystemExit):
            train(config)
    assert [row["iteration"] for row in read_log(config)] == ["1", "2", "3", "4"]
    train(config, resume=True)
    assert [row["iteration"] for row in read_log(config)] == ["1", "2", "3", "4", "5", "6"]


def test_resuming_a_finished_run_changes_nothing(make_config):
    config = make_config()
    train(config)
    before = {path.name: path.read_bytes() for path in config.out.iterdir()}
    assert train(config, resume=True) == 6
    assert before == {path.name: path.read_bytes() for path in config.out.iterdir()}


def test_the_seed_decides_the_run(make_config):
    outs = [make_config(f"run{index}", seed=seed, iterations=2) for index, seed in enumerate((1, 1, 2))]
    for config in outs:
        train(config)
    first, again, other = (load_file(config.out / "model.safetensors") for config in outs)
    assert_equal_states(first, again)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_workers_prepare_the_same_batches(make_config):
    run = loop.Run(make_config(), resume=False)
    alone = list(batches(make_config(), run.objective, 2, run.world))
    helped = list(batches(make_config(workers=1), run.objective, 2, run.world))
    assert len(alone) == 4
    assert_equal_states(alone, helped)


def test_training_learns_and_saves_a_model_that_loads(make_config, images):
    config = make_config(iterations=40, warmup=5, lr=5e-3, sigma=(25, 25), ema=0.8, val=images, save_every=20)
    train(config)
    rows = read_log(config)
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    psnr = [float(row["psnr"]) for row in rows if row["psnr"]]
    assert len(psnr) == 2 and psnr[1] > 21.5  # the noisy images have 20.2 dB

    assert sorted(path.name for path in config.out.iterdir()) == [
        "checkpoint.pth", "config.json", "log.csv", "model.safetensors", "recipe.yml",
    ]  # fmt: skip
    model = ipt_fast.models.open_model(config.out)
    average = load_checkpoint(config.out / "checkpoint.pth")["average"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, average[f"module.{name}"])


def test_average_follows_its_formula(make_config):
    config = make_config(ema=0.5)
    run = loop.Run(config, resume=False)
    weights = []
    for batch in batches(config, run.objective, 0, run.world):
        run.step(batch)
        weights.append(run.model.output.weight.double())
    expected = weights[0]  # the average starts from the first updated weights
    for weight in weights[1:]:
        expected = 0.5 * expected + 0.5 * weight
    assert (weights[0] - weights[-1]).abs().max() > 1e-4
    assert torch.allclose(run.average.module.output.weight.double(), expected, atol=1e-7)


def test_gray_model_and_fine_tuning_from_a_folder(make_config):
    gray = make_config("gray", iterations=1)
    gray = make_config("gray", iterations=1, model_config=gray.model_config | {"in_channels": 1, "out_channels": 1})
    train(gray)
    tuned = make_config("tuned", model=str(gray.out), model_config={}, iterations=1, lr=0.0, lr_min=0.0)
    train(tuned)
    assert_equal_states(load_file(gray.out / "model.safetensors"), load_file(tuned.out / "model.safetensors"))


def test_bfloat16(make_config):
    config = make_config(amp="bf16", iterations=2)
    train(config)
    exact = make_config("exact", iterations=2)
    train(exact)
    low, high = load_file(config.out / "model.safetensors"), load_file(exact.out / "model.safetensors")
    assert low.pop(record.NAME).dtype == torch.int32
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in low.values())
    assert any(not torch.equal(low[key], high[key]) for key in low)


def test_learning_rate(make_config):
    config = make_config(iterations=100, warmup=10, lr=1.0, lr_min=0.1)
    assert learning_rate(config, 0) == 0.1 and learning_rate(config, 9) == 1
    assert learning_rate(config, 10) == 1 and abs(learning_rate(config, 55) - 0.55) < 1e-12
    assert abs(learning_rate(config, 100) - 0.1) < 1e-12


def test_a_crash_while_saving_leaves_the_previous_model(make_config, stop_after, monkeypatch):
    config = make_config()
    stop_after(3)
    train(config)
    before = load_file(config.out / "model.safetensors")

    def crash(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", crash)
        with pytest.raises(OSError, match="disk full"):
            train(config, resume=True)
    assert_equal_states(before, load_file(config.out / "model.safetensors"))
    assert not [path for path in config.out.iterdir() if path.name.startswith(".")]
    assert train(config, resume=True) == 6  # the checkpoint was written first, and is whole


def test_divergence_keeps_the_last_checkpoint(make_config, monkeypatch):
    config = make_config()
    step = loop.Run.step

    def poisoned(run, batch):
        step(run, [batch[0] * float("nan") if run.iteration == 4 else batch[0], batch[1]])

    monkeypatch.setattr(loop.Run, "step", poisoned)
    with pytest.raises(FloatingPointError, match="after 4 iterations"):
        train(config)
    assert load_checkpoint(config.out / "checkpoint.pth")["iteration"] == 3


def test_bad_input(make_config, tmp_path):
    with pytest.raises(ValueError, match="must be a file of a training run to resume"):
        train(make_config("new"), resume=True)
    with pytest.raises(ValueError, match="data must be a folder or a .tar file"):
        train(make_config("new", val=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="patch_size must be .*; got 41"):
        train(make_config("new", iterations=(1, 1), patch_size=(16, 41), batch_size=(1, 1)))
    with pytest.raises(ValueError, match="in_channels must be 3 for denoise, made of clean images; got 6"):
        train(make_config("new", model_config=make_config().model_config | {"in_channels": 6}))
    with pytest.raises(ValueError, match="no_such_model"):
        train(make_config("new", model="no_such_model"))
    assert not (tmp_path / "new").exists()  # nothing is written before the input is known to be good


def test_runs_are_neither_overwritten_nor_mixed(make_config):
    config = make_config(iterations=1)
    train(config)
    with pytest.raises(ValueError, match="out must be a folder without a training run, or be resumed"):
        train(config)
    with pytest.raises(ValueError, match="lr must be 0.0003, as in the run to resume; got 0.001"):
        train(make_config(iterations=1, lr=1e-3), resume=True)


def test_an_output_that_is_no_folder(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder .*file"):
        train(make_config("file"))


def test_large_images_are_cropped_for_validation(tmp_path):
    from ipt_fast.training.validation import ValidationSet

    for index in range(30):
        Image.new("RGB", (150, 100 + index), (index, 0, 0)).save(tmp_path / f"{index:02}.png")
    validation = ValidationSet(tmp_path, 3, 25)
    assert len(validation.pairs) == 10
    assert {tuple(clean.shape) for _, clean in validation.pairs} >= {(3, 100, 128), (3, 127, 128)}
    identity = validation.psnr(torch.nn.Identity(), torch.device("cpu"))
    assert 20 < identity < 23.5  # 20.2 dB, more where dark pixels are clipped


def test_two_steps_are_adamw_and_its_average_by_hand(make_config):
    config = make_config(ema=0.9, weight_decay=0.3, grad_clip=0.0, iterations=2, lr=1e-3, warmup=0, loss="l1")
    run = loop.Run(config, resume=False)
    model = loop.build_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.3, betas=(0.9, 0.999))
    average = None
    for iteration, (noisy, clean) in enumerate(batches(config, run.objective, 0, run.world)):
        run.step([noisy, clean])
        optimizer.param_groups[0]["lr"] = learning_rate(config, iteration)
        optimizer.zero_grad()
        (model(noisy) - clean).abs().mean().backward()
        optimizer.step()
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        if average is not None:
            weights = {name: 0.9 * average[name] + 0.1 * value for name, value in weights.items()}
        average = weights
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value, dict(model.named_parameters())[name], rtol=1e-4, atol=1e-6)
    for name, value in run.average.module.named_parameters():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)
