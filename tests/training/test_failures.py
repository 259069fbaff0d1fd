"""What goes wrong around a training run: said in one sentence, with nothing lost and nothing left behind."""

import contextlib
import errno
import gc
import multiprocessing
import os
import pathlib
import resource
import signal
import subprocess
import threading
import time
import warnings

import pytest
import torch

from ipt_fast.cli import main
from ipt_fast.data.dataset import ImageFolder
from ipt_fast.data.stream import ImageStream
from ipt_fast.models import open_model
from ipt_fast.training import checkpoint, loop, objectives
from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.loop import train
from tests.training.test_loop import assert_equal_states, read_log
from tests.training.test_pretraining import FIELDS, TINY

WANTED = ["mps", "meta", "hpu", "nonsense", *(["cuda", "cuda:1"] if not torch.cuda.is_available() else [])]
WANTED += ["xpu"] if not torch.xpu.is_available() else []


# Before the first iteration


@pytest.mark.parametrize("device", WANTED)
@pytest.mark.parametrize("command", ["train", "finetune"])
def test_devices_that_are_not_there(images, tmp_path, error_of_command, device, command):
    model = ["--model", "ipt_v2_tiny"] if command == "train" else ["--model", "ipt_tiny", "--task", "derain"]
    paths = ["--data", str(images), "--out", str(tmp_path / "a" / "run")]
    assert main([command, *model, *paths, "--patch", "16", "--iterations", "1", "--device", device]) == 2
    said = error_of_command()
    assert said.startswith(f"ipt-fast: error: device must be usable; got {device} (") and len(said) < 260
    assert not (tmp_path / "a").exists()
    assert main(["restore", str(images / "0.png"), str(tmp_path / "0.png"), "--device", device]) == 2
    assert error_of_command() == said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "runs/gone", "model_config": {}},
            "model must be a folder written by save_pretrained or one of .*ipt,",
        ),
        ({"task": "dehaze"}, "task must be sr_x<n>, derain, denoise.*; got 'dehaze'"),
        ({"sigma": (5, 256)}, "sigma must be at most 255"),
        ({"val_sigma": 300.0}, "val_sigma must be at most 255"),
        ({"val_sigma": 15.0}, "val_sigma must be left out where val is"),
        ({**FIELDS, "sigma": (10, 20)}, "sigma must be left out where no task is denoise, of sr_x2, derain, denoise30"),
        ({**FIELDS, "val_sigma": 15.0}, "val_sigma must be left out for IPT"),
        ({**FIELDS, "task": "dehaze"}, "task must be one of sr_x2, derain, denoise30; got 'dehaze'"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
    ],
)
def test_settings_that_would_be_ignored_or_misunderstood(make_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(make_config("a/run", **changes))
    assert not (tmp_path / "a").exists()


def test_noise_levels_of_a_task_that_takes_them(make_config):
    config = make_config(**{**FIELDS, "model_config": {**TINY, "tasks": ("denoise",)}, "sigma": (10, 20)}, iterations=1)
    assert train(config) == 1


def test_a_folder_that_cannot_be_written(make_config, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()

    def refuse(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # the tests' user may write everywhere
    with pytest.raises(ValueError, match=r"out must be a folder that can be written; got .*run \(Permission denied\)"):
        train(make_config())
    assert not [*(tmp_path / "run").iterdir()]


def test_nothing_is_left_of_a_run_whose_first_step_fails(make_config, tmp_path, monkeypatch):
    def fail(run, batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop.Run, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(make_config("a/b/run"))
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError, match="out of memory"):
        train(make_config("mine"))
    assert [*(tmp_path / "mine").iterdir()] == []


# Broken images


@pytest.fixture(params=["one task", "several"])
def on_demand(request, make_config, monkeypatch):
    """Settings of a run that decodes each image when it is drawn, of either kind of model."""
    monkeypatch.setattr(objectives, "MEMORY_BUDGET", 0)
    if request.param == "several":
        return lambda out="run", **changes: make_config(out, **{**FIELDS, **changes})
    return make_config


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_the_middle(on_demand, images, monkeypatch, workers):
    settings = {"iterations": 40, "save_every": 30, "log_every": 10, "batch_size": 2, "workers": workers}
    whole = on_demand("whole", **settings)
    train(whole)

    config, contents, step = (
        on_demand("parts", **settings),
        {p: p.read_bytes() for p in images.iterdir()},
        loop.Run.step,
    )

    def breaking(run, batch):
        step(run, batch)
        if run.iteration == 10:
            for path, content in contents.items():  # the header is whole
                path.write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", breaking)
        said = r"got none: cannot read image .*\.png.*; the (\d+) iterations before it are saved in .*parts$"
        with pytest.raises(ValueError, match=said) as raised:
            train(config)
    assert "\n" not in str(raised.value)
    reached = load_checkpoint(config.out / "checkpoint.pth")["iteration"]
    assert 10 <= reached < 30 and f"the {reached} iterations" in str(raised.value)
    with pytest.raises(ValueError, match="got none: cannot read image"):  # again, and nothing is lost
        train(config, resume=True)
    assert load_checkpoint(config.out / "checkpoint.pth")["iteration"] == reached

    for path, content in contents.items():
        path.write_bytes(content)
    with warnings.catch_warnings(action="error"):
        assert train(config, resume=True) == 40
    ends = [load_checkpoint(each.out / "checkpoint.pth") for each in (whole, config)]
    assert_equal_states(*({key: end[key] for key in ("model", "average", "optimizer", "rng")} for end in ends))
    assert [row["loss"] for row in read_log(whole)] == [row["loss"] for row in read_log(config)]


def test_an_image_that_is_broken_from_the_start(on_demand, images, tmp_path):
    contents = {path: path.read_bytes() for path in sorted(images.iterdir())}
    for path, content in contents.items():
        path.write_bytes(content[:200])
    with pytest.raises(ValueError, match=r"^data must hold an image that can be used; got none: cannot read image "):
        train(on_demand("a/run", batch_size=24))
    assert not (tmp_path / "a").exists()
    first = next(iter(contents))
    first.write_bytes(contents[first])  # one is enough
    with pytest.warns(UserWarning, match=r"skipped \d of the images: cannot read image [^;]*\.png"):
        train(on_demand("a/run", batch_size=24))


# Processes that prepare batches


@pytest.fixture
def signal_workers(monkeypatch):
    """Send a signal to the processes that prepare batches, and perhaps to this one, at the start of a step."""

    def arrange(iteration, number, all=False):
        step = loop.Run.step

        def disturbed(run, batch):
            if run.iteration == iteration:
                pids = [worker.pid for worker in multiprocessing.active_children()] + [os.getpid()] * all
                # From another process: PyTorch's workers take SIGTERM of their parent for a regular end.
                subprocess.run(["kill", f"-{number:d}", *map(str, pids)], check=True)
                time.sleep(0.3)
            step(run, batch)

        monkeypatch.setattr(loop.Run, "step", disturbed)

    gc.collect()  # a failed run's workers end with its error's traceback, which may lie in a cycle
    before = signal.getsignal(signal.SIGTERM)
    yield arrange
    gc.collect()
    for worker in multiprocessing.active_children():  # told to end, it may need a moment on a busy machine
        worker.join(20)
    assert signal.getsignal(signal.SIGTERM) is before and not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_stops(make_config, signal_workers, number):
    signal_workers(3, number, all=True)
    config = make_config(iterations=12, save_every=10, workers=2)
    assert train(config) == 4
    assert load_checkpoint(config.out / "checkpoint.pth")["iteration"] == 4


def test_a_killed_worker_costs_nothing(make_config, signal_workers, monkeypatch):
    whole, config = (make_config(out, iterations=12, save_every=10, workers=1) for out in ("whole", "parts"))
    train(whole)
    with monkeypatch.context():
        signal_workers(3, signal.SIGKILL)
        said = r"^DataLoader worker .*exited unexpectedly; the (\d+) iterations before it are saved in .*parts$"
        with pytest.raises(ValueError, match=said):
            train(config)
    reached = load_checkpoint(config.out / "checkpoint.pth")["iteration"]
    assert 4 <= reached < 10
    monkeypatch.undo()
    assert train(config, resume=True) == 12
    assert_equal_states(*(load_checkpoint(each.out / "checkpoint.pth") for each in (whole, config)))


# Logs that are none


@pytest.mark.parametrize("name", ["log.csv", "config.json", "model.safetensors", "checkpoint.pth"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_outputs_that_are_no_files(make_config, name, kind):
    config = make_config(iterations=1)
    config.out.mkdir()
    if kind == "pipe":
        os.mkfifo(config.out / name)
    else:
        (config.out / name).symlink_to(os.devnull)
    raised = []

    def run():  # in a thread, as it could hang
        try:
            train(config)
        except ValueError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert raised == [f"{name} in out must be a file; got {config.out / name}, which is none"]
    assert [path.name for path in config.out.iterdir()] == [name]


# Links


@pytest.mark.parametrize("kind", [ImageFolder, ImageStream])
def test_linked_folders_and_images_are_followed(images, tmp_path, kind):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "linked").symlink_to(images)
    (data / "sub" / "one.png").symlink_to(images / "1.png")
    (data / "sub" / "up").symlink_to(data)  # a circle
    (images / "round").symlink_to(data)  # a wider one
    (data / ".hidden").symlink_to(images)
    (images / "sub").mkdir()
    (images / "sub" / "deep.png").write_bytes((images / "2.png").read_bytes())
    found = kind(data)
    paths = found.paths if kind is ImageFolder else [entry.path for entry in found.entries]
    names = ["linked/0.png", "linked/1.png", "linked/2.png", "linked/sub/deep.png", "sub/one.png"]
    assert [path.relative_to(data).as_posix() for path in paths] == names
    (tmp_path / "link").symlink_to(data)
    assert len(kind(tmp_path / "link")) == 5 and torch.equal(found[4], kind(images)[1])


def test_a_linked_shard(images, tmp_path):
    import tarfile

    (tmp_path / "elsewhere").mkdir()
    with tarfile.open(tmp_path / "elsewhere" / "s.tar", "w") as archive:
        archive.add(images / "0.png", "0.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shards").symlink_to(tmp_path / "elsewhere")
    assert len(ImageStream(tmp_path / "data")) == 1


@pytest.mark.parametrize("changes", [{}, FIELDS])
def test_a_link_to_nothing_is_said(make_config, images, tmp_path, changes):
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match=r"left out of .*: 1 \(gone\.png\)"):
        assert train(make_config(iterations=1, **changes)) == 1


# A full disk


@contextlib.contextmanager
def full_disk(path):
    """As atomic_write, on a disk without space."""
    temporary = pathlib.Path(path).with_name(f".full{pathlib.Path(path).suffix}")
    temporary.symlink_to("/dev/full")
    try:
        yield temporary
    finally:
        temporary.unlink()


def test_no_space_for_the_checkpoint(make_config, monkeypatch):
    config = make_config()
    before = {}

    def save(path, state, usual=checkpoint.save_checkpoint):
        if state["iteration"] == 6:
            before.update({each.name: each.read_bytes() for each in path.parent.iterdir()})
            monkeypatch.setattr(checkpoint, "atomic_write", full_disk)
        usual(path, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    with pytest.raises(OSError, match=r"^cannot write .*checkpoint\.pth: No space left on device$") as raised:
        train(config)
    assert raised.value.errno == errno.ENOSPC
    after = {each.name: each.read_bytes() for each in config.out.iterdir()}
    assert after.keys() == before.keys() and after["checkpoint.pth"] == before["checkpoint.pth"]
    assert load_checkpoint(config.out / "checkpoint.pth")["iteration"] == 3
    monkeypatch.undo()
    assert train(config, resume=True) == 6


def test_no_space_for_the_model_or_the_log(make_config):
    config = make_config()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def train_with(bytes, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, limits[1]))
        try:
            return train(config, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(OSError, match=r"^cannot write .*log\.csv: File too large$"):
        train_with(10)
    assert not config.out.exists()  # it was the first thing to be written
    with pytest.raises(OSError, match=r"^cannot write .*checkpoint\.pth: File too large$"):
        train_with(2000)
    assert [path.name for path in config.out.iterdir()] == ["log.csv"]
    train(config)
    with pytest.raises(OSError, match=r"^cannot write .*model\.safetensors: .*File too large"):
        run = loop.Run(config, resume=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            run.average.module.save_pretrained(config.out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_model(config.out) and not [path for path in config.out.iterdir() if path.name.startswith(".")]
