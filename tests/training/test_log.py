"""What a run tells about its progress: rows, TensorBoard, and a line at the end."""

import re
import sys
import time

import pytest

from ipt_fast.cli import main
from ipt_fast.training import loop
from ipt_fast.training.log import LOG_FIELDS, Log, Pace, is_log
from ipt_fast.training.loop import train
from tests.training.test_loop import read_log

# Here and not in the test: at a time when no other thread imports what it imports.
try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    EventAccumulator = None


def test_pace_of_a_run(make_config, monkeypatch):
    """Images a second and the share of the time that is spent on waiting, between rows and in the end."""
    config, lines = make_config(iterations=4, log_every=2), []
    batches = loop.batches

    def slow(*arguments):
        for batch in batches(*arguments):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(loop, "batches", slow)
    assert train(config, say=lines.append) == 4
    rows = read_log(config)
    assert list(rows[0]) == list(LOG_FIELDS)
    for row in rows:
        assert 0 < float(row["images_per_second"]) < 2 / 0.05  # two images a step
        assert 0 < float(row["data_wait"]) < 1 and float(row["grad_norm"]) > 0
        assert 50 < float(row["peak_memory_mb"]) < 50_000
        step = 2 / float(row["images_per_second"])
        assert float(row["data_wait"]) * step > 0.045
    (line,) = lines
    found = re.fullmatch(
        r"trained on 8 images in ([\d.]+) s: ([\d.]+) images/s, ([\d.]+) % of the time waiting for data, "
        r"peak memory \d+ MB",
        line,
    )
    assert found and float(found[1]) > 0.2 and float(found[3]) > 1


def test_pace_counts_from_where_it_was_taken():
    pace = Pace()
    pace.images += 4
    with pace.waiting():
        time.sleep(0.02)
    images, seconds, waited = pace.taken()
    assert images == 4 and 0.02 <= waited <= seconds
    assert pace.images == 0 and pace.taken()[2] == 0


def test_the_command_prints_it(make_config, capsys):
    config = make_config()
    train(config)
    assert main(["train", "--out", str(config.out), "--resume"]) == 0
    assert "trained on" not in capsys.readouterr().out  # nothing was left to do
    settings = ["--patch", "16", "--batch-size", "2", "--iterations", "1", "--device", "cpu"]
    assert main(["train", "--data", str(config.data), "--out", f"{config.out}2", *settings]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("trained on 2 images in ") and last.startswith("finished 1 iterations")


OLD = "iteration,loss,lr,seconds,psnr\r\n2,0.5,1e-4,1.0,\r\n3,0.4,1e-4,2.0,20.1\r\n"


def test_logs_of_older_runs_go_on(make_config, tmp_path):
    config = make_config()
    train(config)
    path = config.out / "log.csv"
    path.write_text(OLD + "4,0.2,1e-4,")
    assert is_log(path)
    Log(path).start(3)
    rows = read_log(config)
    assert [row["loss"] for row in rows] == ["0.5", "0.4"] and rows[1]["psnr"] == "20.1"
    assert all(row[name] == "" for row in rows for name in LOG_FIELDS[5:]) and is_log(path)
    for content in ("", "iteration,loss\r\n1,2\r\n", OLD + "1,2,3,4,5,6,7,8,9\r\n", OLD + "a note\r\n"):
        path.write_text(content)
        assert not is_log(path)


def test_tensorboard(make_config, images, monkeypatch):
    if EventAccumulator is None:
        pytest.skip("the package tensorboard is not installed")
    config = make_config(tensorboard=True, log_every=1, val=images)
    step = loop.Run.step

    def killed(run, batch):
        step(run, batch)
        if run.iteration == 5:
            raise SystemExit  # after rows of 4, with the last checkpoint at 3

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", killed)
        with pytest.raises(SystemExit):
            train(config)
    assert train(config, resume=True) == 6
    events = EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["grad_norm", "images_per_second", "loss", "lr", "psnr"]
    rows = read_log(config)
    for name in ("loss", "lr", "grad_norm"):
        scalars = events.Scalars(name)
        assert [each.step for each in scalars] == [1, 2, 3, 4, 5, 6]
        assert [each.value for each in scalars] == pytest.approx([float(row[name]) for row in rows])
    assert [each.step for each in events.Scalars("psnr")] == [3, 6]


def test_tensorboard_that_is_not_there(make_config, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = r"tensorboard must be installed .*ipt-fast\[train\]"
    with pytest.raises(ImportError, match=said):
        train(make_config("a/run", tensorboard=True))
    options = ["--patch", "16", "--device", "cpu", "--tensorboard"]
    assert main(["train", "--data", str(images), "--out", str(tmp_path / "a" / "run"), *options]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "a").exists()
