"""`ipt-fast eval` through its parser, on synthetic images and a small saved model."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from ipt_fast import create_model
from ipt_fast.cli import main
from ipt_fast.inference import Restorer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a saved model that returns its input."""
    identity = create_model("ipt_v2_tiny", width=4, heads=(1, 1, 1, 1), depths=(1, 0, 0, 0))
    torch.nn.init.zeros_(identity.output.weight)
    folder = tmp_path_factory.mktemp("model")
    identity.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        pixels = np.random.default_rng(len(name)).integers(60, 200, (24, 17, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / name)
    return folder


def run(*arguments):
    return main(["eval", *map(str, arguments)])


def rows(output):
    """The table's lines as lists of words, without title and header."""
    return [line.split() for line in output.splitlines()[2:]]


def test_table_csv_and_json(model, photos, tmp_path, capsys):
    files = tmp_path / "out.csv", tmp_path / "out.json"
    status = run("--model", model, "--data", photos, "--sigma", 15, 25, "--csv", files[0], "--json", files[1])
    assert status == 0
    table = rows(capsys.readouterr().out)
    assert [row[:3] for row in table] == [["photos", "15", "2"], ["photos", "25", "2"]]
    assert float(table[0][3]) == pytest.approx(20 * np.log10(255 / 15), abs=0.5)
    assert float(table[1][3]) == pytest.approx(20 * np.log10(255 / 25), abs=0.5)
    lines = files[0].read_text().splitlines()
    assert [line.split(",")[1:5] for line in lines[1:]] == [
        ["photos", "rgb", "15", "2"],
        ["photos", "rgb", "25", "2"],
    ]
    content = json.loads(files[1].read_text())
    assert content["settings"]["backend"] == "auto"
    assert len(content["evaluations"][0]["scores"]) == 2
    assert float(table[1][4]) == pytest.approx(content["evaluations"][1]["mean"]["psnr_output"], abs=0.006)


def test_options_reach_the_evaluation(model, photos, tmp_path, capsys):
    report = tmp_path / "out.json"
    options = ["--protocol", "ipt-y", "--crop", 2, "--limit", 1, "--tile", "whole", "--dtype", "float32"]
    options += ["--device", "cpu", "--backend", "reference", "--json", report]
    assert run("--model", model, "--data", photos, photos, "--sigma", 50, *options) == 0
    assert [row[2] for row in rows(capsys.readouterr().out)] == ["1", "1"]
    content = json.loads(report.read_text())
    assert content["settings"] == {
        "task": None,
        "crop": 2,
        "limit": 1,
        "backend": "reference",
        "tile": None,
        "dtype": "torch.float32",
        "device": "cpu",
    }
    assert content["evaluations"][0]["protocol"] == "ipt-y"
    uncropped = [option for option in options if option not in ("--crop", 2)]
    assert run("--model", model, "--data", photos, "--sigma", 50, *uncropped) == 0
    assert json.loads(report.read_text())["evaluations"][0]["mean"] != content["evaluations"][0]["mean"]


def test_a_paired_set(model, photos, tmp_path, capsys):
    """Targets that are one level brighter everywhere: 20 log10(255) = 48.13 dB."""
    (tmp_path / "target").mkdir()
    for path in photos.iterdir():
        PIL.Image.fromarray(np.asarray(PIL.Image.open(path)) + np.uint8(1)).save(tmp_path / "target" / path.name)
    assert run("--model", model, "--data", photos, "--target", tmp_path / "target") == 0
    assert rows(capsys.readouterr().out) == [
        [f"{tmp_path.name}/photos", "-", "2", "48.13", "48.13", "1.0000", "1.0000"]
    ]


def test_one_bad_file(model, photos, capsys):
    (photos / "broken.png").write_bytes(b"no image")
    assert run("--model", model, "--data", photos, "--sigma", 25) == 1
    output = capsys.readouterr()
    assert rows(output.out)[0][:3] == ["photos", "25", "2"]
    assert "photos/broken.png: cannot read image" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data must have either --sigma"),
        (["--sigma", "25", "--target", "x"], "--data must have either --sigma"),
        (["--sigma", "-5"], "sigma must be positive and finite; got -5"),
        (["--sigma", "25", "--limit", "0"], "limit must be at least 1; got 0"),
        (["--sigma", "25", "--tile", "3"], "tile must be"),
        (["--sigma", "25", "--device", "moon"], "device must be usable; got moon"),
        (
            ["--sigma", "25", "--tile", "big"],
            "must be auto, whole, a size in pixels, blend, paper, official; got 'big'",
        ),
        (["--sigma", "25", "--protocol", "psnr"], "invalid choice: 'psnr'"),
        (["--sigma", "25", "--model", "unknown"], "unknown"),
        (["--sigma", "25", "--data", "nowhere"], "folder must exist; got nowhere"),
        (["--sigma", "25", "--backend", "triton"], "backend 'triton' cannot run"),
    ],
)
def test_bad_arguments(model, photos, capsys, arguments, message):
    """One sentence on stderr, status 2 and nothing on stdout, whether the parser or the evaluation finds out."""
    try:
        status = run("--model", model, "--data", photos, *arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    output = capsys.readouterr()
    assert output.err.splitlines()[-1].startswith("ipt-fast") and message in output.err.splitlines()[-1]
    assert output.out == ""


def test_a_backend_that_cannot_run_is_noticed_before_any_image(model, photos, capsys, monkeypatch):
    monkeypatch.setattr("ipt_fast.cli.eval.evaluate", lambda *arguments, **options: pytest.fail("work was begun"))
    assert run("--model", model, "--data", photos, "--sigma", 25, "--backend", "triton") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_out_of_memory_fails_one_image(model, photos, tmp_path, capsys, monkeypatch):
    """What cannot be restored is reported, the others are scored and recorded."""
    restore = Restorer.__call__

    def with_little_memory(self, image):
        if image.shape[0] == 30:
            raise torch.OutOfMemoryError("no memory is left")
        return restore(self, image)

    monkeypatch.setattr(Restorer, "__call__", with_little_memory)
    PIL.Image.new("RGB", (17, 30)).save(photos / "large.png")
    assert run("--model", model, "--data", photos, "--sigma", 25, "--csv", tmp_path / "out.csv") == 1
    output = capsys.readouterr()
    assert "photos/large.png: no memory is left" in output.err
    assert rows(output.out)[0][:3] == ["photos", "25", "2"]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2


def test_a_report_that_cannot_be_written_is_noticed_first(model, photos, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("name,value\n")
    before = sorted(tmp_path.rglob("*"))
    for option, path in [
        ("--csv", tmp_path / "missing" / "x.csv"),
        ("--json", tmp_path / "no" / "x"),
        ("--json", Path("/proc/x.json")),  # no file can be made there, even by root
        ("--json", photos),
        ("--csv", photos),
        ("--csv", other),
        ("--csv", photos / "a.png"),
    ]:
        assert run("--model", model, "--data", photos, "--sigma", 25, option, path) == 2
        output = capsys.readouterr()
        assert str(path) in output.err
        assert output.out == ""
    assert other.read_text() == "name,value\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_unreadable_images_adds_no_row(model, photos, tmp_path, capsys):
    files = tmp_path / "out.csv", tmp_path / "out.json"
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    assert run("--model", model, "--data", photos, "--sigma", 25, "--csv", files[0], "--json", files[1]) == 1
    assert len(files[0].read_text().splitlines()) == 1
    assert json.loads(files[1].read_text())["evaluations"][0]["mean"]["psnr_output"] is None


def test_data_sets_of_one_name_are_told_apart(model, photos, tmp_path, capsys):
    other = tmp_path / "more" / "photos"
    shutil.copytree(photos, other)
    report = tmp_path / "r.json"
    assert run("--model", model, "--data", photos, other, "--sigma", 25, "--json", report) == 0
    names = [f"{tmp_path.name}/photos", "more/photos"]
    assert [row[0] for row in rows(capsys.readouterr().out)] == names
    content = json.loads(report.read_text())["evaluations"]
    assert [each["dataset"] for each in content] == names
    assert [each["folder"] for each in content] == [str(photos), str(other)]


def test_what_is_left_out_of_a_folder_is_named_once(model, photos, capsys):
    (photos / "notes.txt").write_text("")
    assert run("--model", model, "--data", photos, "--sigma", 15, 25) == 0
    assert capsys.readouterr().err == f"ipt-fast: warning: left out of {photos}, as no image by name: 1 (notes.txt)\n"
