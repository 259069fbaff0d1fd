"""`ipt-fast restore --ray` and RestoreFiles on a local cluster: the same files and words, also where workers die."""

import argparse
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ipt_fast
from ipt_fast.cli import _journal, _ray
from ipt_fast.cli._jobs import Job
from ipt_fast.data.io import Image, read_image, write_image
from ipt_fast.inference import Restorer
from ipt_fast.inference.ray import RestoreFiles, map_rows

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs on this machine, whose workers import what this process does."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        at_sigterm = signal.getsignal(signal.SIGTERM)  # Ray leaves a handler of its own
        environment = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
        yield ray
        ray.shutdown()
        signal.signal(signal.SIGTERM, at_sigterm)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = ipt_fast.create_model("ipt_v2_tiny", width=4, heads=(1, 1, 1, 1), depths=(1, 0, 0, 0))
    with torch.no_grad():
        model.output.weight *= 0.01
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def save(path, seed=0, channels=3, alpha=False):
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 190, (19, 18, channels), np.uint8)
    write_image(path, Image(pixels, rng.integers(0, 256, (19, 18), np.uint8) if alpha else None))
    return path


def records(folder):
    return [json.loads(line) for line in (folder / _journal.NAME).read_text().split("\n") if line]


def test_files_words_and_status_are_those_of_restore(cluster, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # and relative paths mean the same to the workers
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", number, channels=1 if number == 1 else 3, alpha=number == 2)
    save(tmp_path / "photos" / "x.jpg", 4)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    (tmp_path / "photos" / "missing.tif").symlink_to("nowhere")
    said = {}
    for folder, options in (("plain", []), ("ray", ["--ray"])):
        assert run("photos", folder, *options, "--compare", "--target", "photos") == 1
        captured = capsys.readouterr()
        lines = re.sub(r"\(\d+\.\d s\)", "(s)", captured.out).replace(folder, "out").splitlines()
        said[folder] = sorted(lines), sorted(line for line in captured.err.splitlines() if "photos" in line)
    assert said["ray"] == said["plain"] and "restored 4, skipped 0, failed 1" in said["ray"][0]
    assert "error: cannot read image photos/bad.png" in "".join(said["ray"][1])
    names = sorted(path.name for path in (tmp_path / "ray").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "plain").iterdir()) and len(names) == 9
    for name in set(names) - {_journal.NAME}:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    key = json.dumps
    assert sorted(records(tmp_path / "ray"), key=key) == sorted(records(tmp_path / "plain"), key=key)
    # What is there is skipped, by either of the two.
    (tmp_path / "photos" / "bad.png").unlink()
    for options in (["--ray"], []):
        assert run("photos", "ray", "--compare", "--target", "photos", *options) == 0
        assert capsys.readouterr().out.startswith("skipped 4 of 4: already restored")


@pytest.mark.slow
def test_workers_that_are_killed_lose_and_double_nothing(cluster, run, tmp_path, monkeypatch, capsys):
    """Killed before the work, within the file, and after the work but before the report."""
    for number in range(6):
        save(tmp_path / "photos" / f"{number}.png", number)
    log = tmp_path / "log"

    class Killed(_ray.RestoreJobs):
        def restore(self, job):
            number, first = int(job.source.stem), self._place.name.endswith(".0")
            if first and number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if first and number == 2:
                (self._place / "2.png").write_bytes(b"half of a f")
                os.kill(os.getpid(), signal.SIGKILL)
            report = super().restore(job)
            with log.open("a") as file:
                file.write(f"{number}\n")
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return report

    monkeypatch.setattr("ipt_fast.cli.restore.restore_on_ray", functools.partial(_ray.restore_on_ray, worker=Killed))
    assert run(tmp_path / "photos", tmp_path / "out", "--ray") == 0
    captured = capsys.readouterr()
    assert sorted(line.split(" -> ")[0][-5:-4] for line in captured.out.splitlines() if " -> " in line) == list(
        "012345"
    )
    assert sorted(log.read_text().split()) == list("012345")  # each was done once
    assert sorted(record["result"][0] for record in records(tmp_path / "out")) == list("012345")
    assert sorted(os.listdir(tmp_path / "out")) == [_journal.NAME, *(f"{number}.png" for number in range(6))]
    assert run(tmp_path / "photos", tmp_path / "plain") == 0
    for number in range(6):
        name = f"{number}.png"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.slow
def test_an_image_that_always_kills_its_worker_is_given_up(cluster, run, tmp_path, monkeypatch, capsys):
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", number)

    class Poisoned(_ray.RestoreJobs):
        def restore(self, job):
            if job.source.stem == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().restore(job)

    with monkeypatch.context() as patch:
        patch.setattr("ipt_fast.cli.restore.restore_on_ray", functools.partial(_ray.restore_on_ray, worker=Poisoned))
        assert run(tmp_path / "photos", tmp_path / "out", "--ray") == 1
    captured = capsys.readouterr()
    assert "1.png: error: each of 3 processes that restored it was killed" in captured.err
    assert captured.out.endswith("restored 2, skipped 0, failed 1\n")
    assert run(tmp_path / "photos", tmp_path / "out", "--ray") == 0  # the next run does what is missing
    assert capsys.readouterr().out.endswith("restored 1, skipped 2, failed 0\n")


@pytest.mark.slow
def test_results_that_cannot_take_their_place_fail(cluster, run, tmp_path, capsys):
    save(tmp_path / "photos" / "0.png")
    save(tmp_path / "photos" / "1.png", 1)
    (tmp_path / "out" / "1.png").mkdir(parents=True)
    for options in ([], ["--overwrite"]):
        assert run(tmp_path / "photos", tmp_path / "out", "--ray", *options) == 1
        assert "1.png is a folder" in capsys.readouterr().err
    assert read_image(tmp_path / "out" / "0.png").pixels.shape == (19, 18, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ray", "--ray-cpus", "3"],
            "--ray-cpus and --ray-gpus must be what a machine of the cluster has; got 3 and 0",
        ),
        (["--ray", "--ray-gpus", "1"], "must be what a machine of the cluster has; got 1 and 1"),
        (["--ray", "--ray-workers", "0"], "--ray-workers must be at least 1; got 0"),
        (["--ray", "--ray-cpus", "0"], "--ray-cpus must be positive and finite; got 0"),
        (["--ray", "--ray-gpus", "-1"], "--ray-gpus must be finite and at least 0; got -1"),
        (["--ray-workers", "2"], "--ray-workers must be left out without --ray; got 2"),
        (["--ray", "--backend", "triton"], "backend 'triton' cannot run"),
        (["--ray", "--tile", "3"], "tile must be"),
    ],
)
def test_a_wrong_call_is_one_before_any_work(cluster, run, tmp_path, capsys, options, message):
    photo = save(tmp_path / "photos" / "0.png")
    assert run(photo.parent, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and captured.out == ""
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_single_file_is_not_for_ray(run, tmp_path, capsys):
    assert run(save(tmp_path / "a.png"), tmp_path / "o.png", "--ray") == 2
    assert "OUT must be a folder with --ray; got" in capsys.readouterr().err


def test_without_ray(run, tmp_path, capsys, monkeypatch):
    save(tmp_path / "photos" / "0.png")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(tmp_path / "photos", tmp_path / "out", "--ray") == 2
    assert "pip install 'ipt-fast[ray]'" in capsys.readouterr().err


def test_a_class_for_map_batches(cluster, model, tmp_path):
    """Bad images are rows with an error, and the pixels are those of a Restorer."""
    rows = []
    (tmp_path / "out").mkdir()
    for number in range(5):
        source = save(tmp_path / "photos" / f"{number}.png", number)
        rows.append({"source": str(source), "destination": str(tmp_path / "out" / source.name)})
    (tmp_path / "photos" / "3.png").write_bytes(b"no image")
    rows[4]["destination"] = str(tmp_path / "nowhere" / "4.png")
    stored = cluster.put(ipt_fast.models.open_model(model))
    arguments = {"model": stored, "tile": None, "dtype": "float32"}
    found = list(map_rows(rows, RestoreFiles, arguments, workers=2, num_cpus=1, num_gpus=0))
    found = sorted(found, key=lambda row: row["source"])
    assert [row["source"] for row in found] == [row["source"] for row in rows]
    assert [bool(row["error"]) for row in found] == [False, False, False, True, True]
    assert "cannot read image" in found[3]["error"] and found[3]["sha256"] == ""
    restorer = Restorer(ipt_fast.models.open_model(model), tile=None, dtype="float32", device="cpu")
    for row in found[:3]:
        expected = restorer(read_image(row["source"]).pixels)
        np.testing.assert_array_equal(read_image(row["destination"]).pixels, expected)
        assert row["sha256"] == _journal.digest_of_file(Path(row["destination"])) and row["seconds"] > 0
    assert sorted(os.listdir(tmp_path / "out")) == ["0.png", "1.png", "2.png"]


def test_a_worker_has_its_part_of_the_machine(model):
    before = torch.get_num_threads()
    try:
        worker = RestoreFiles(str(model), cpus=1, device="cpu")
        assert torch.get_num_threads() == 1
        assert worker._restorer.memory_share == pytest.approx(1 / os.cpu_count())
        assert worker._restorer.device.type == "cpu"
    finally:
        torch.set_num_threads(before)
    half = Restorer(ipt_fast.models.open_model(model), device="cpu")
    image, whole = torch.zeros(1, 3, 4000, 4000), half._tile_size(torch.zeros(1, 3, 4000, 4000))
    half.memory_share = 0.0
    assert half._tile_size(image).height < whole.height


def test_where_nothing_can_be_written_images_fail_and_not_the_run(model, tmp_path, monkeypatch):
    """As on a full disk: no folder for an attempt, then no report in it, then half of a result."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    options = {"task": None, "tile": "auto", "overlap": None, "blend": "cosine", "self_ensemble": False}
    options |= {"dtype": "auto", "device": "cpu", "backend": "auto", "noise": None, "max_pixels": None}
    args = argparse.Namespace(**options, ray_cpus=1, ray_gpus=0)
    folder, photo = tmp_path / "attempts", save(tmp_path / "photos" / "0.png")
    job = pickle.dumps(Job(photo, tmp_path / "out" / "0.png", None, None, ""))
    batch = {"index": np.array([0]), "job": [job]}
    try:
        worker = _ray.RestoreJobs(ipt_fast.models.open_model(model), args, {}, folder, str(tmp_path))
        report = pickle.loads(worker(batch)["report"][0])
        assert "No such file or directory" in report.outcome.error and report.files == []
        folder.mkdir()
        monkeypatch.setattr(_ray, "_REPORT", "nowhere/report.pickle")
        report = pickle.loads(worker(batch)["report"][0])
        assert report.outcome.error == "" and [path.name for _, path, _, _ in report.files] == ["0.png"]

        def fill_disk(path, image):
            path.write_bytes(b"half of a f")
            raise OSError("it is full")

        monkeypatch.setattr("ipt_fast.cli._work.write_image", fill_disk)
        report = pickle.loads(worker(batch)["report"][0])
        assert report.outcome.error == "it is full" and report.files == []
        assert [path.name for path in folder.rglob("*.png")] == ["0.png"]  # the whole one of before
    finally:
        torch.set_num_threads(threads)


def processes_with(token):
    """Workers of Ray that restore, of the cluster with this in its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (path / "environ").read_bytes() and b"MapWorker" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_cluster_of_its_own_that_is_killed_and_whose_workers_are(model, tmp_path):
    """The command as a user runs it: killed itself, then started again, when a worker is killed three times."""
    pytest.importorskip("ray")
    count, token = 30, f"IPT_FAST_TEST={os.getpid()}"
    for number in range(count):
        save(tmp_path / "photos" / f"{number:02}.png", number)
    command = [sys.executable, "-m", "ipt_fast.cli", "restore", tmp_path / "photos", tmp_path / "out", "--ray"]
    command += ["--model", model, "--device", "cpu", "--ray-workers", "2", "--self-ensemble"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    environment |= dict([token.split("=")])
    start = functools.partial(subprocess.Popen, list(map(str, command)), env=environment, text=True)

    def results():
        return {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.png")}

    def wait_for(number, process):
        end = time.monotonic() + 500
        while process.poll() is None and len(results()) < number and time.monotonic() < end:
            time.sleep(0.05)

    with start(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(5, process)
        process.kill()
    before, end = results(), time.monotonic() + 60
    while processes_with(token) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_with(token) == [] and 5 <= len(before) < count  # the cluster has gone with it

    killed, process = 0, start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for number in (10, 15, 20):
        wait_for(number, process)
        if workers := processes_with(token):
            os.kill(workers[0], signal.SIGKILL)
            killed += 1
    out, err = process.communicate(timeout=500)
    assert (process.returncode, err.strip(), killed) == (0, "", 3)
    assert out.count(" -> ") == count - len(before)
    assert {name: results()[name] for name in before} == before and len(results()) == count
    assert len({record["result"] for record in records(tmp_path / "out")}) == count
    restorer = Restorer(ipt_fast.models.open_model(model), device="cpu", self_ensemble=True)
    for name in results():
        expected = restorer(read_image(tmp_path / "photos" / name).pixels)
        np.testing.assert_array_equal(read_image(tmp_path / "out" / name).pixels, expected)
