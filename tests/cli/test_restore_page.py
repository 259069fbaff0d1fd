"""`ipt-fast restore --html`: a page of what is in the folders, whenever it was made."""

import re

import numpy as np
import pytest
import torch

import ipt_fast
from ipt_fast.data.io import Image, write_image
from ipt_fast.evaluation.page import is_page


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = ipt_fast.create_model("ipt_v2_tiny", width=4, heads=(1, 1, 1, 1), depths=(1, 0, 0, 0))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def save(path, seed=0, channels=3, dtype=np.uint8, alpha=False):
    path.parent.mkdir(exist_ok=True)
    rng, top = np.random.default_rng(seed), np.iinfo(dtype).max
    pixels = rng.integers(top // 4, top, (19, 18, channels), dtype)
    write_image(path, Image(pixels, rng.integers(0, top, (19, 18), dtype) if alpha else None))
    return path


def shown(page):
    """{name: (number of pictures, the line beside it)} of all that the page shows, in its order."""
    found = {}
    for figure in re.findall(r"<figure.*?</figure>", page.read_text(), re.DOTALL):
        name, note = re.search(r"<b>(.*?)</b><span>(.*?)</span>", figure).groups()
        found[name] = figure.count("<img"), note
    return found


def test_images_of_all_kinds_with_those_of_earlier_runs_and_failures(run, tmp_path):
    photos, page = tmp_path / "photos", tmp_path / "p.html"
    save(photos / "a.png")
    assert run(photos, tmp_path / "out") == 0
    save(photos / "b.jpg", 1, channels=1)
    save(photos / "c.png", 2, alpha=True)
    pytest.importorskip("imagecodecs")
    save(photos / "d.png", 3, dtype=np.uint16)
    (photos / "e.png").write_bytes(b"no image")
    assert run(photos, tmp_path / "out", "--html", page) == 1
    found = shown(page)
    assert list(found) == ["a.png", "b.jpg", "c.png", "d.png", "e.png"] and is_page(page)
    assert [pictures for pictures, _ in found.values()] == [2, 2, 2, 2, 0]
    assert found["a.png"][1] == "18 x 19" and "cannot read image" in found["e.png"][1]
    # The same page again, of a run that has nothing to do.
    (photos / "e.png").unlink()
    assert run(photos, tmp_path / "out", "--html", page) == 0
    assert len(shown(page)) == 4


def test_targets_and_noise_add_a_version(run, tmp_path):
    photo, page = save(tmp_path / "photos" / "a.png"), tmp_path / "p.html"
    save(tmp_path / "clean" / "a.png", 1)
    assert run(photo, tmp_path / "o1.png", "--target", tmp_path / "clean", "--html", page) == 0
    assert shown(page)["a.png"][0] == 3
    assert run(photo, tmp_path / "o2.png", "--noise", 25, "--html", page) == 0
    assert shown(page)["a.png"][0] == 3


def test_a_page_beside_new_results(run, tmp_path):
    photo = save(tmp_path / "photos" / "a.png")
    assert run(photo.parent, tmp_path / "out", "--html", tmp_path / "out" / "index.html") == 0
    assert list(shown(tmp_path / "out" / "index.html")) == ["a.png"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("photos/a.png", "--html must not overwrite an input; got"),
        ("out/a.png", "--html must not overwrite an input; got"),
        ("out/.ipt_fast_results.jsonl", "--html must not overwrite an input; got"),
        ("notes.txt", "--html must be a new file, or one that this command made; got"),
        ("photos", "--html must be a file; got the folder"),
        ("nowhere/p.html", "--html must be in a folder that can be written; got"),
    ],
)
def test_pages_that_may_not_be_written(run, tmp_path, capsys, page, message):
    photo = save(tmp_path / "photos" / "a.png")
    (tmp_path / "notes.txt").write_text("mine")
    before = photo.read_bytes()
    assert run(photo.parent, tmp_path / "out", "--html", tmp_path / page) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert photo.read_bytes() == before and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_page_that_cannot_be_written_is_named(run, tmp_path, capsys):
    photo = save(tmp_path / "photos" / "a.png")
    assert run(photo.parent, tmp_path / "out", "--html", "/dev/full") == 2
    captured = capsys.readouterr()
    assert "cannot write /dev/full: No space left on device" in captured.err and "restored 1" in captured.out


def test_pictures_have_a_least_size(run, tmp_path, capsys):
    photo = save(tmp_path / "photos" / "a.png")
    assert run(photo.parent, tmp_path / "out", "--html", tmp_path / "p.html", "--html-size", 3) == 2
    assert "--html-size must be at least 16; got 3" in capsys.readouterr().err
