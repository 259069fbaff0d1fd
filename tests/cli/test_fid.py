"""``ipt-fast fid``: figures of folders and files, the record, bad images, and what is refused."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from ipt_fast.cli import fid as command
from ipt_fast.cli import main
from ipt_fast.evaluation.generation import read_statistics
from tests.evaluation.test_generation import Tiny, photos, save
from tests.test_public_names import PUBLISHED, keys_of


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save(Tiny().eval(), tmp_path_factory.mktemp("network") / "net.pt")


@pytest.fixture
def run(network):
    return lambda *options: main(["fid", "--features", str(network), "--device", "cpu", *map(str, options)])


@pytest.fixture
def sets(tmp_path):
    """A folder of classes and a file of 12 samples each, and 14 real images."""
    for number, image in enumerate(photos(12)):
        path = tmp_path / "samples" / str(number % 2) / f"{number // 2:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    in_order = photos(12)[::2] + photos(12)[1::2]
    np.savez(tmp_path / "samples.npz", arr_0=np.stack(in_order))
    np.savez(tmp_path / "real.npz", arr_0=np.stack(photos(14, seed=1)))
    return tmp_path


def figures(path):
    return json.loads(path.read_text())["figures"]


def test_folders_and_files_have_the_same_figures(run, sets, capsys):
    for name in ("samples", "samples.npz"):
        assert run(sets / name, sets / "real.npz", "--json", sets / f"{name}.json", "--batch-size", 5) == 0
        printed = capsys.readouterr().out
        assert "12 images, compared with" in printed and "FID  " in printed and "precision" in printed
    assert set(PUBLISHED["json"]["fid"].split()) <= keys_of(json.loads((sets / "samples.json").read_text()))
    found = figures(sets / "samples.json")
    assert found == pytest.approx(figures(sets / "samples.npz.json"))
    assert all(value is not None for value in found.values()) and found["fid"] > 0


def test_a_part_of_a_folder_is_of_all_classes(tmp_path):
    """In the order of names the first half would be of one class."""
    for number in range(40):
        path = tmp_path / str(number // 20) / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(np.full((2, 2, 3), number, np.uint8)).save(path)
    first, again = ([int(image[0, 0, 0]) for image in command._Folder(tmp_path)] for _ in range(2))
    assert first == again and sorted(first) == [*range(40)]
    assert 5 <= sum(number < 20 for number in first[:20]) <= 15


def test_statistics_are_a_reference(run, sets, capsys):
    assert run(sets / "real.npz", "--save-statistics", sets / "real_statistics.npz") == 0
    assert "Inception Score" in capsys.readouterr().out
    assert read_statistics(sets / "real_statistics.npz").spatial is not None
    assert run(sets / "samples", sets / "real_statistics.npz", "--json", sets / "one.json") == 0
    assert "precision                 -" in capsys.readouterr().out
    assert run(sets / "samples", sets / "real.npz", "--json", sets / "other.json") == 0
    one, other = figures(sets / "one.json"), figures(sets / "other.json")
    assert one["precision"] is None and one["recall"] is None
    for name in ("fid", "sfid", "inception_score"):
        assert one[name] == pytest.approx(other[name], rel=1e-9)


def test_statistics_with_images_have_all_figures(run, sets):
    """As the reference batches of ADM, whose statistics are of more images than they hold."""
    run(sets / "samples.npz", "--save-statistics", sets / "s.npz")
    with np.load(sets / "s.npz") as arrays:
        np.savez(sets / "both.npz", arr_0=np.stack(photos(14, seed=1)), **arrays)
    assert run(sets / "samples.npz", sets / "both.npz", "--json", sets / "both.json") == 0
    assert run(sets / "samples.npz", sets / "real.npz", "--json", sets / "real.json") == 0
    both, real = figures(sets / "both.json"), figures(sets / "real.json")
    assert both["fid"] == pytest.approx(0, abs=1e-9) and real["fid"] > 1e-3
    assert (both["precision"], both["recall"]) == (real["precision"], real["recall"])


def test_bad_images_are_named_skipped_and_counted(run, sets, capsys):
    (sets / "samples" / "0" / "00.png").write_bytes(b"nonsense")
    assert run(sets / "samples", sets / "real.npz") == 1
    printed = capsys.readouterr()
    assert f"{sets / 'samples' / '0' / '00.png'}: error: cannot read image" in printed.err
    assert "skipped 1 of 12 images, which cannot be read" in printed.err and "11 images, compared" in printed.out


def test_wrong_calls(run, sets, tmp_path, capsys):
    with torch.no_grad():
        other = Tiny()
        other.maps = torch.nn.Conv2d(3, 7, 3, 2, 1)
        other.classes = torch.nn.Linear(7, 4)
    wide = save(other.eval(), tmp_path / "other.pt")
    main(["fid", str(sets / "real.npz"), "--features", str(wide), "--save-statistics", str(sets / "narrow.npz")])
    (sets / "mine.json").write_text("mine")
    np.savez(sets / "one.npz", arr_0=np.stack(photos(1)))
    np.savez(sets / "nothing.npz", other=np.zeros(3))
    for options, message in (
        ([sets / "none"], "SAMPLES must be a folder of images or a .npz file; got"),
        ([sets / "samples", sets / "mine.json"], "REFERENCE must be a folder of images or a .npz file; got"),
        ([sets / "samples", sets / "narrow.npz"], "features must be as wide as those they are compared with, 7; got 9"),
        ([sets / "samples", sets / "nothing.npz"], "must hold statistics, mu and sigma, or images, arr_0; got other"),
        ([sets / "one.npz", sets / "real.npz"], "features must be of at least 2 images for a covariance; got 1"),
        ([sets / "samples", "--batch-size", 0], "--batch-size must be at least 1; got 0"),
        ([sets / "samples", "--json", sets / "mine.json"], "--json must be a new file, or one that this command made"),
        ([sets / "samples", "--save-statistics", sets / "real.npz"], "--save-statistics must be a new file, or one"),
        ([sets / "samples", "--save-statistics", sets / "s.txt"], "--save-statistics must be a .npz file; got"),
    ):
        capsys.readouterr()
        assert run(*options) == 2
        assert message in capsys.readouterr().err
    assert (sets / "mine.json").read_text() == "mine"
