"""One guard for all commands: nothing is overwritten that the command did not make."""

import csv
import json
import os
import stat
import threading

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.evaluation.report import CSV_COLUMNS
from ipt_fast.training.loop import LOG_FIELDS

MICRO = {"width": 4, "heads": [1, 1, 1, 1], "depths": [1, 0, 0, 0], "window_size": 8, "grid_size": 4}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    ipt_fast.create_model("ipt_v2_tiny", **MICRO).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        pixels = np.random.default_rng(len(name)).integers(60, 200, (24, 17, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments, message, folder, status=2):
    before = contents(folder)
    assert run(*arguments) == status
    assert message in capsys.readouterr().err
    assert contents(folder) == before


@pytest.fixture
def evaluate(model, photos):
    return ["eval", "--model", model, "--data", photos, "--sigma", 25, "--device", "cpu", "--limit", 1]


@pytest.fixture
def train(photos):
    call = ["train", "--data", photos, "--model", "ipt_v2_tiny", "--model-config", json.dumps(MICRO), "--patch", 16]
    return [*call, "--batch-size", 1, "--iterations", 2, "--save-every", 1, "--log-every", 1, "--device", "cpu"]


@pytest.mark.parametrize("option", ["--csv", "--json"])
def test_eval_writes_over_nothing_of_others(evaluate, model, photos, tmp_path, capsys, option):
    (tmp_path / "foreign").write_text('{"name": "a package"}\n')
    (tmp_path / "link").symlink_to(photos / "a.png")
    os.link(photos / "b.png", tmp_path / "hard_link")
    (photos / "empty.png").write_bytes(b"")
    for name, message in (
        ("foreign", "foreign must have the columns" if option == "--csv" else "or one that this command made; got"),
        ("link", "must not overwrite an input"),
        ("hard_link", "must not overwrite an input"),
        ("photos/empty.png", "must not overwrite an input"),
        ("photos/../photos/a.png", "must not overwrite an input"),
        ("model/config.json", "must not overwrite an input"),
        ("model/model.safetensors", "must not overwrite an input"),
        ("photos", "must be a file"),
    ):
        refused(capsys, *evaluate, option, tmp_path / name, message=message, folder=tmp_path)


def test_eval_writes_over_what_it_made(evaluate, tmp_path):
    table, report, empty = (tmp_path / name for name in ("t.csv", "r.json", "empty.json"))
    empty.write_bytes(b"")
    for _ in range(2):
        assert run(*evaluate, "--csv", table, "--json", report) == 0
    assert len(table.read_text().splitlines()) == 3
    assert run(*evaluate, "--json", empty) == 0 and json.loads(empty.read_text())["evaluations"]


def test_two_reports_in_one_place(evaluate, tmp_path, capsys):
    arguments = [*evaluate, "--csv", tmp_path / "x", "--json", tmp_path / "." / "x"]
    refused(capsys, *arguments, message="--json must have a place for each output; got", folder=tmp_path)


def test_reports_into_devices_and_pipes(evaluate, tmp_path):
    (tmp_path / "null").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert run(*evaluate, "--csv", tmp_path / "pipe", "--json", tmp_path / "null") == 0
    reader.join(10)
    assert [row["images"] for row in csv.DictReader(got[0].splitlines())] == ["1"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "null").is_symlink()
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_reports_through_links(evaluate, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "table.csv").symlink_to("far/real.csv")
    for _ in range(2):
        assert run(*evaluate, "--csv", tmp_path / "table.csv") == 0
    assert (tmp_path / "table.csv").is_symlink()
    assert len((tmp_path / "far" / "real.csv").read_text().splitlines()) == 3


def test_a_report_that_nobody_reads_ends_quietly(evaluate, capfd):
    read, write = os.pipe()
    os.close(read)
    assert run(*evaluate, "--json", f"/dev/fd/{write}") == 141  # as a program that SIGPIPE ends
    os.close(write)
    assert capfd.readouterr().err == ""


def test_plot_writes_over_its_own_pictures_only(model, photos, tmp_path, capsys):
    plot = ["plot", "restorations", tmp_path / "plot.png", "--model", model, "--image"]
    assert run(*plot, photos / "a.png") == 0
    assert run(*plot, photos / "b.png") == 0
    refused(capsys, *plot, tmp_path / "plot.png", message="OUT must not overwrite an input", folder=tmp_path)
    for place, message in (("a.png", "OUT must not overwrite an input"), ("b.png", "or one that this command made")):
        plot[2] = photos / place
        refused(capsys, *plot, photos / "a.png", message=message, folder=tmp_path)
    plot[2] = tmp_path / "link.png"
    plot[2].symlink_to(photos / "b.png")
    refused(capsys, *plot, photos / "a.png", message="or one that this command made", folder=tmp_path)


def test_plot_into_a_missing_folder_fails_before_the_work(model, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ipt_fast.cli.plot.open_model", None)
    out = tmp_path / "none" / "plot.png"
    message = f"OUT must be in a folder that can be written; got {out} (No such file or directory)"
    arguments = ["plot", "restorations", out, "--model", model, "--image", photos / "a.png"]
    refused(capsys, *arguments, message=message, folder=tmp_path)


def test_restore_never_writes_over_what_it_reads(model, photos, tmp_path, capsys):
    (tmp_path / "link.png").symlink_to(photos / "a.png")
    os.link(photos / "a.png", tmp_path / "hard.png")
    (model / "picture.png").write_bytes((photos / "b.png").read_bytes())
    torch.save(ipt_fast.models.open_model(model).state_dict(), tmp_path / "weights.png")
    restore = ["restore", photos / "a.png"]
    options = ["--overwrite", "--device", "cpu", "--model"]
    for out in (tmp_path / "link.png", tmp_path / "hard.png", model / "picture.png"):
        message = "OUT must not overwrite an input; got"
        refused(capsys, *restore, out, *options, model, message=message, folder=tmp_path)
    out = tmp_path / "weights.png"
    refused(capsys, *restore, out, *options, "ipt_v2_tiny", "--checkpoint", out, message=message, folder=tmp_path)


def test_restore_writes_through_links_and_into_pipes(model, photos, tmp_path):
    options = ["--model", model, "--device", "cpu"]
    (tmp_path / "far").mkdir()
    (tmp_path / "link.png").symlink_to("far/real.png")
    os.mkfifo(tmp_path / "pipe.png")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe.png").read_bytes()))
    reader.start()
    assert run("restore", photos / "a.png", tmp_path / "pipe.png", *options) == 0
    reader.join(10)
    for again in ([], ["--overwrite"]):
        assert run("restore", photos / "a.png", tmp_path / "link.png", *options, *again) == 0
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "far" / "real.png").read_bytes() == got[0]
    assert stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)


@pytest.mark.parametrize("name", ["log.csv", "config.json", "model.safetensors"])
def test_train_writes_over_nothing_of_others(train, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine\n")
    message = f"{name} in --out must be a new file, or one that this command made; got {tmp_path}/run/{name}"
    refused(capsys, *train, "--out", tmp_path / "run", message=message, folder=tmp_path)


def test_train_starts_again_where_a_run_saved_nothing(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text(",".join(LOG_FIELDS[:5]) + "\r\n1,0.5,1e-4,1.0,\r\n2,0.")
    assert run(*train, "--out", tmp_path / "run") == 0
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 3


def test_a_resumed_run_keeps_its_log_or_refuses_it(train, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*train, "--out", out) == 0
    log = (out / "log.csv").read_bytes()
    for content in (b"another,table\r\n", log + b"a note of mine\r\n", log + b"\0\0\0\r\n"):
        (out / "log.csv").write_bytes(content)
        refused(capsys, *train, "--out", out, "--resume", message="log.csv in --out must be", folder=tmp_path)
    for content in (log, log + b"2,0."):  # a killed run ends its log anywhere
        (out / "log.csv").write_bytes(content)
        assert run(*train, "--out", out, "--resume") == 0
        assert (out / "log.csv").read_bytes() == log


def test_finetune_into_its_own_model(model, photos, tmp_path, capsys):
    (tmp_path / "link").symlink_to(model)
    for out in (model, tmp_path / "link"):
        arguments = ["finetune", "--model", model, "--out", out, "--data", photos, "--device", "cpu"]
        message = "config.json in --out must not overwrite an input"
        refused(capsys, *arguments, message=message, folder=tmp_path)


def test_convert_into_what_is_there(model, tmp_path, capsys):
    torch.save(ipt_fast.models.open_model(model).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "null").symlink_to(os.devnull)
    (tmp_path / "gone").symlink_to("nowhere")
    for out in ("full", "null", "gone", "weights.pth"):
        arguments = ["convert", tmp_path / "weights.pth", tmp_path / out, "--model", "ipt_v2_tiny"]
        refused(capsys, *arguments, message="OUT must be a new folder, or an empty one", folder=tmp_path)


def test_columns_of_the_table(evaluate, tmp_path):
    """What other programs do to a table between two evaluations."""
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + ",".join(f'"{name}"' for name in CSV_COLUMNS).encode())
    assert run(*evaluate, "--csv", tmp_path / "t.csv") == 0
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8-sig") as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["1"]
