"""Results are skipped only where they are known to be what a run would make again, also after a kill at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch

import ipt_fast
from ipt_fast.cli import _journal, main
from ipt_fast.data.io import Image, read_image, write_image
from ipt_fast.inference import Restorer


def save_model(folder, seed, width=4):
    torch.manual_seed(seed)
    model = ipt_fast.create_model("ipt_v2_tiny", width=width, heads=(1, 1, 1, 1), depths=(1, 0, 0, 0))
    with torch.no_grad():
        model.output.weight *= 0.01
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture
def run(model):
    def call(*arguments):
        return main(["restore", "--model", str(model), "--device", "cpu", *map(str, arguments)])

    return call


def save(path, seed=0, channels=3):
    path.parent.mkdir(exist_ok=True)
    write_image(path, Image(np.random.default_rng(seed).integers(60, 190, (9, 8, channels), np.uint8)))
    return path


@pytest.fixture
def photo(tmp_path):
    return save(tmp_path / "photos" / "a.png")


@pytest.mark.parametrize("name", ["o.png", "o.jpg", "o.tif", "o.webp", "o.bmp"])
def test_the_same_again_is_skipped_in_every_format(run, tmp_path, capsys, name):
    photo, out = save(tmp_path / "photos" / name), tmp_path / "out"
    assert run(photo, out) == 0
    before = (out / name).stat()
    capsys.readouterr()
    assert run(photo, out) == 0
    assert capsys.readouterr().out == "skipped 1 of 1: already restored (--overwrite restores them again)\n"
    assert (out / name).stat().st_ino == before.st_ino


def test_a_file_for_a_file_has_no_record(run, photo, tmp_path, capsys):
    """A folder of photos gets no hidden file; what is there is there, whatever it was made of."""
    out, comparison = tmp_path / "o.png", tmp_path / "o_compare.png"
    assert run(photo, out) == 0
    content = out.read_bytes()
    capsys.readouterr()
    for options in ([], ["--compare"]):
        assert run(photo, out, *options) == 1
        assert capsys.readouterr().err == f"{photo}: error: {out} exists; --overwrite replaces it\n"
    out.unlink()
    comparison.write_text("mine")
    assert run(photo, out, "--compare") == 1 and not out.exists()
    assert run(photo, out, "--compare", "--overwrite") == 0 and out.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["o.png", "o_compare.png", "photos"]
    assert os.listdir(tmp_path / "photos") == ["a.png"]


def test_the_record_is_of_what_was_asked(run, photo, tmp_path, monkeypatch):
    """Not of what that means on this machine: a folder can be moved to another."""
    assert run(photo, tmp_path / "out") == 0
    (line,) = (tmp_path / "out" / _journal.NAME).read_text().split("\n")[1:-1]
    options = json.loads(line)["made_from"]["options"]
    assert (options["dtype"], options["tile"], options["overlap"]) == ("auto", "auto", None)


@pytest.mark.parametrize(
    "change", ["other source", "changed source", "model", "weights", "option", "dtype", "edited", "empty", "no journal"]
)
def test_anything_else_exists_and_is_an_error(run, photo, tmp_path, capsys, change):
    folder, out = tmp_path / "out", tmp_path / "out" / "a.png"
    assert run(photo, folder) == 0
    source, options = photo, []
    if change == "other source":
        source = save(tmp_path / "others" / "a.png", 1)
    elif change == "changed source":
        save(photo, 1)
    elif change == "model":
        options = ["--model", save_model(tmp_path / "other", 0, width=8)]
    elif change == "weights":
        options = ["--model", save_model(tmp_path / "other", 1)]
    elif change == "option":
        options = ["--self-ensemble"]
    elif change == "dtype":
        options = ["--dtype", "float32"]
    elif change == "edited":
        save(out, 5)
    elif change == "empty":
        out.write_bytes(b"")
    else:
        (folder / _journal.NAME).unlink()
    before = out.read_bytes()
    capsys.readouterr()
    assert run(source, folder, *options) == 1
    captured = capsys.readouterr()
    assert f"{source}: error: {out} exists, and is not known to be made of this image by this model" in captured.err
    assert "--overwrite" in captured.err and captured.out == "restored 0, skipped 0, failed 1\n"
    assert out.read_bytes() == before
    assert run(source, folder, *options, "--overwrite") == 0 and len(out.read_bytes()) > 0
    assert run(source, folder, *options) == 0


def test_the_same_model_from_another_place_is_the_same(run, photo, tmp_path, model):
    assert run(photo, tmp_path / "out") == 0
    shutil.copytree(model, tmp_path / "copy")
    assert run(photo, tmp_path / "out", "--model", tmp_path / "copy") == 0


def test_a_folder_in_the_place_of_a_result(run, photo, tmp_path, capsys):
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    for options in ([], ["--overwrite"]):
        assert run(photo, tmp_path / "out", *options) == 1
        assert f"{tmp_path}/out/a.png is a folder" in capsys.readouterr().err


def test_a_moved_folder_of_results_keeps_its_records(run, photo, tmp_path):
    assert run(photo.parent, tmp_path / "out") == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    assert run(photo.parent, tmp_path / "moved") == 0


def test_a_comparison_depends_on_its_target(run, photo, tmp_path):
    targets = [save(tmp_path / name / "a.png", 7 + i) for i, name in enumerate(("one", "two"))]
    call = [photo, tmp_path / "out", "--compare", "--target"]
    assert [run(*call, targets[0]), run(*call, targets[0]), run(*call, targets[1])] == [0, 0, 1]
    assert run(photo, tmp_path / "out", "--target", targets[1]) == 0  # the result itself does not
    (tmp_path / "out" / "a_compare.png").unlink()
    assert run(*call, targets[1]) == 0


def test_a_damaged_journal_is_survived(run, photo, tmp_path):
    out, other = tmp_path / "out", save(tmp_path / "photos" / "p.png", 1)
    assert run(photo, out) == 0
    journal = out / _journal.NAME
    damage = b'\xff\n[]\n{"result": "a.png"}\n' + 100_000 * b"[" + b"\n"
    journal.write_bytes(damage + journal.read_bytes() + b'{"result": "o.p')
    assert run(photo, out) == 0
    assert run(other, out) == 0
    assert run(other, out) == 0
    lines = journal.read_bytes().splitlines()
    assert len([json.loads(line) for line in lines if line.startswith(b'{"result": "p')]) == 1


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_journal_that_is_an_input(run, photo, tmp_path, capsys, link):
    (tmp_path / "out").mkdir()
    link(photo, tmp_path / "out" / _journal.NAME)
    before = photo.read_bytes()
    assert run(photo, tmp_path / "out") == 2
    assert f"OUT must not overwrite an input; got {tmp_path}/out/{_journal.NAME}" in capsys.readouterr().err
    assert photo.read_bytes() == before


def test_a_journal_that_leads_elsewhere(run, photo, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "out" / _journal.NAME).symlink_to("../notes")
    assert run(photo, tmp_path / "out") == 0
    assert "no record could be kept" in capsys.readouterr().err and (tmp_path / "notes").read_text() == "mine"


def test_what_killed_runs_leave_is_no_image(run, photo, tmp_path):
    for folder in ("photos", "out"):
        save(tmp_path / folder / ".0123456789abcdef.png")
    for source in (tmp_path / "photos", f"{tmp_path}/photos/*"):
        assert run(source, tmp_path / "out") == 0
    assert run(tmp_path / "out", tmp_path / "again") == 0
    assert sorted(os.listdir(tmp_path / "again")) == [_journal.NAME, "a.png"]


def test_a_result_without_a_record_is_told(run, photo, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / _journal.NAME).mkdir()  # not even root can write there
    assert run(photo, tmp_path / "out") == 0
    assert "a.png: warning: it is restored, but a later run will not know" in capsys.readouterr().err
    assert run(photo, tmp_path / "out") == 1


class Killed(BaseException):
    """Nothing in the command catches it."""


@pytest.mark.parametrize("step", ["record", "replace", "print"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_run_that_ends_at_any_step_is_continued(run, tmp_path, monkeypatch, step, options):
    """Just before the record, between the record and the file, and after both; onto nothing and onto older results."""
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", number)
    out = tmp_path / "out"
    if options:
        assert run(tmp_path / "photos", out, "--self-ensemble") == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}

    def killed(*_, **__):
        raise Killed

    original = _journal.Journal.add
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if step == "record":
            patch.setattr(_journal.Journal, "add", killed)
        elif step == "replace":
            patch.setattr(_journal.Journal, "add", lambda *call: (original(*call), killed()))
        else:
            patch.setattr("tqdm.tqdm.write", killed)
        run(tmp_path / "photos", out, *options)
    expected = 1 if step == "print" else 0
    after = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert sum(before.get(name) != content for name, content in after.items()) == expected
    # A later run without --overwrite takes nothing for done that is not, and does nothing twice.
    kept = {path.name: path.stat().st_ino for path in out.glob("*.png")}
    assert run(tmp_path / "photos", out) == (1 if options else 0)
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert run(tmp_path / "photos", out, *options) == 0
    assert run(tmp_path / "photos", tmp_path / "fresh") == 0
    for number in range(3):
        assert (out / f"{number}.png").read_bytes() == (tmp_path / "fresh" / f"{number}.png").read_bytes()


def killed_and_resumed(tmp_path, model, count, kills):
    """Restore a folder in processes that are killed at random moments, and check all that they leave."""
    rng = random.Random(0)
    pixels = np.random.default_rng(0).integers(60, 190, (count, 9, 8, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for number in range(count):
        write_image(tmp_path / "photos" / f"{number:04}.png", Image(pixels[number]))
    out, seen, lines, stopped = tmp_path / "out", {}, [], 0
    command = [sys.executable, "-u", "-m", "ipt_fast.cli", "restore", tmp_path / "photos", out]
    command = [str(part) for part in [*command, "--model", model, "--device", "cpu", "--dtype", "float32"]]
    for _ in range(kills + 1):
        with (tmp_path / "stdout").open("w+") as stdout:
            process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL)
            done = len(seen)
            if stopped < kills:
                # Killed once some more images are there, at a moment of its own between two of them.
                goal = done + max(1, (count - done) // (kills - stopped + 1) - rng.randrange(3))
                while process.poll() is None and len(list(out.glob("[0-9]*.png"))) < goal:
                    time.sleep(0.002)
                time.sleep(rng.random() * 0.02)
                process.send_signal(signal.SIGKILL)
            status = process.wait(120)
            stdout.seek(0)
            lines += [line.split(" -> ")[0] for line in stdout if " -> " in line]
        for path in out.glob("[0-9]*.png"):
            inode = path.stat().st_ino, path.stat().st_mtime_ns
            assert seen.setdefault(path.name, inode) == inode, f"{path.name} was done twice"
            read_image(path)  # whole
        if status == 0:
            break
        assert status == -signal.SIGKILL
        stopped += 1
    assert status == 0 and stopped == kills and len(seen) == count
    assert len(set(lines)) == len(lines) <= count
    opened = ipt_fast.models.open_model(model)
    restorer = Restorer(opened, dtype="float32", device="cpu")
    for number in range(count):
        np.testing.assert_array_equal(read_image(out / f"{number:04}.png").pixels, restorer(pixels[number]))
    left = [path.name for path in out.iterdir() if path.name not in seen and path.name != _journal.NAME]
    assert len(left) <= kills and all(name.startswith(".") for name in left)  # temporary files of killed processes


def test_a_run_killed_once(tmp_path, model):
    killed_and_resumed(tmp_path, model, count=40, kills=1)


@pytest.mark.slow
def test_a_thousand_photos_killed_ten_times(tmp_path, model):
    killed_and_resumed(tmp_path, model, count=1000, kills=10)


def test_several_inputs_and_a_folder(run, tmp_path, capsys):
    """As the shell expands a pattern, with options anywhere, and with folders and quoted patterns among them."""
    photos = [save(tmp_path / "photos" / f"{name}.png", i) for i, name in enumerate("abc")]
    save(tmp_path / "more" / "d.png")
    assert run(*photos, tmp_path / "out") == 0
    assert run(photos[0], "--tile", 16, photos[1], "--dtype", "float32", photos[2], tmp_path / "mixed") == 0
    assert run(tmp_path / "photos" / "[ab].png", tmp_path / "more", photos[0], tmp_path / "all") == 0
    found = {name: sorted(path.name for path in (tmp_path / name).glob("*.png")) for name in ("out", "mixed", "all")}
    assert found == {
        "out": ["a.png", "b.png", "c.png"],
        "mixed": ["a.png", "b.png", "c.png"],
        "all": ["a.png", "b.png", "d.png"],
    }
    before = photos[2].read_bytes()
    for arguments in (photos, [*photos, tmp_path / "new.png"], [*photos, tmp_path / "text"]):
        (tmp_path / "text").write_text("in the way")
        assert run(*arguments) == 2
        assert f"OUT must be a folder for several images; got {arguments[-1]}" in capsys.readouterr().err
    assert run(photos[0], photos[2]) == 1  # the last one is no output, if it is there
    assert photos[2].read_bytes() == before
    with pytest.raises(SystemExit):
        run(*photos, tmp_path / "out", "--bogus", "x")
    assert "unrecognized arguments: --bogus x" in capsys.readouterr().err


def test_clashing_names_of_several_inputs(run, tmp_path, capsys):
    paths = [save(tmp_path / "x" / "a.png"), save(tmp_path / "y" / "a.png")]
    assert run(*paths, tmp_path / "out") == 2
    assert f"a.png for both {paths[0]} and {paths[1]}" in capsys.readouterr().err


def test_formats_that_are_only_read_give_png(run, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in ("a.gif", "b.ppm", "c.jfif", "d.TGA", "e"):
        format = {"e": "PNG", "d.TGA": "TGA"}.get(name)
        PIL.Image.new("RGB", (9, 8), (90, 120, 150)).save(tmp_path / "photos" / name, format)
    assert run(tmp_path / "photos", tmp_path / "out") == 0
    assert "left out of" in capsys.readouterr().err
    assert run(tmp_path / "photos" / "e", tmp_path / "out") == 0  # a file that is named is taken for what it is
    assert sorted(os.listdir(tmp_path / "out"))[1:] == ["a.png", "b.png", "c.jfif", "d.png", "e.png"]
    assert run(tmp_path / "photos" / "a.gif", tmp_path / "o.gif") == 2
    assert "path must end in .png" in capsys.readouterr().err


def test_targets_of_one_stem(run, tmp_path, capsys):
    for name, seed in (("1.png", 1), ("1.bmp", 2), ("2.png", 3), ("3.png", 4)):
        save(tmp_path / "photos" / name, seed)
    shutil.copytree(tmp_path / "photos", tmp_path / "clean")
    (tmp_path / "clean" / "2.png").unlink()
    save(tmp_path / "clean" / "2.bmp")
    save(tmp_path / "clean" / "2.tif")
    (tmp_path / "clean" / "3.png").rename(tmp_path / "clean" / "3.jpg")  # read for what it is, and the only one
    assert run(tmp_path / "photos", tmp_path / "out", "--target", tmp_path / "clean") == 1
    captured = capsys.readouterr()
    assert captured.out.count("PSNR inf dB -> ") == 3
    assert "2.png: error: --target must hold one image by the name of each input; got 2.bmp, 2.tif" in captured.err
