"""`ipt-fast eval` for the papers' tables: MAE, LPIPS, two views, scores of every image, published figures, the page."""

import csv
import json

import numpy as np
import PIL.Image
import pytest
import torch

from ipt_fast import create_model
from ipt_fast.cli import main
from ipt_fast.evaluation.lpips import load_lpips
from ipt_fast.evaluation.page import is_page
from ipt_fast.evaluation.report import CSV_COLUMNS, IMAGE_COLUMNS, LONG_CSV_COLUMNS

LAYERS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def identity(folder, **config):
    """A saved model that returns the first three channels of its input."""
    model = create_model("ipt_v2_tiny", width=4, heads=(1, 1, 1, 1), depths=(1, 0, 0, 0), **config)
    torch.nn.init.zeros_(model.output.weight)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return identity(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    state = {}
    for index, (layer, (outputs, inputs, kernel)) in enumerate(LAYERS.items()):
        weight = torch.randn(outputs, inputs, kernel, kernel) * (2 / inputs / kernel**2) ** 0.5
        state |= {f"features.{layer}.weight": weight, f"features.{layer}.bias": torch.zeros(outputs)}
        state[f"lin{index}.model.1.weight"] = torch.rand(1, outputs, 1, 1) / outputs
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(state, folder / "lpips.pth")
    return folder


def save(path, seed, shape=(40, 36, 3), add=0):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(60, 200, shape, dtype=np.uint8) + np.uint8(add)
    PIL.Image.fromarray(pixels).save(path)
    return pixels / 255


@pytest.fixture
def pairs(tmp_path):
    """Two inputs, whose targets are 10 levels brighter."""
    for number in range(2):
        save(tmp_path / "input" / f"{number}.png", number)
        save(tmp_path / "target" / f"{number}.png", number, add=10)
    return ["--data", tmp_path / "input", "--target", tmp_path / "target", "--device", "cpu"]


def run(*arguments):
    return main(["eval", *map(str, arguments)])


def test_defocus_has_mae_and_lpips_everywhere(model, weights, pairs, tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "images")}
    options = ["--csv", files["csv"], "--json", files["json"], "--per-image", files["images"]]
    options += ["--html", tmp_path / "p.html"]
    assert run("--model", model, *pairs, "--protocol", "dpdd", "--lpips", weights, *options) == 0
    header, row = capsys.readouterr().out.splitlines()[1:3]
    assert header.endswith("MAE in    MAE out   LPIPS in  LPIPS out")
    assert [float(each) for each in row.split()[-4:-2]] == pytest.approx([10 / 255] * 2, abs=1e-4)
    images = [(np.asarray(PIL.Image.open(tmp_path / side / "0.png")) / 255) for side in ("input", "target")]
    expected = load_lpips([weights]).compare(*images)
    mean, scores = (json.loads(files["json"].read_text())["evaluations"][0][name] for name in ("mean", "scores"))
    assert scores[0]["lpips_output"] == pytest.approx(expected, rel=1e-3) and expected > 0
    assert mean["lpips_input"] == pytest.approx(mean["lpips_output"], rel=1e-3)
    (means,) = csv.DictReader(files["csv"].open())
    assert tuple(means) == LONG_CSV_COLUMNS and float(means["mae_output"]) == pytest.approx(10 / 255, abs=1e-4)
    assert (tmp_path / "p.html").read_text().count(f"LPIPS {expected:.3f} → {expected:.3f}") == 1
    rows = list(csv.DictReader(files["images"].open()))
    assert tuple(rows[0]) == IMAGE_COLUMNS and [row["image"] for row in rows] == ["0.png", "1.png"]
    for row, score in zip(rows, scores, strict=True):
        assert float(row["psnr_output"]) == pytest.approx(score["psnr_output"], abs=1e-4)
        assert float(row["lpips_output"]) == pytest.approx(score["lpips_output"], abs=1e-4)


def test_tables_with_and_without_mae(model, pairs, tmp_path, capsys):
    """A table of one kind takes no rows that would lose figures; one with more columns takes all."""
    short, long = tmp_path / "short.csv", tmp_path / "long.csv"
    assert run("--model", model, *pairs, "--csv", short) == 0
    assert run("--model", model, *pairs, "--csv", short, "--protocol", "dpdd") == 2
    assert "short.csv must have the columns" in capsys.readouterr().err
    assert short.read_text().splitlines()[0] == ",".join(CSV_COLUMNS) and len(short.read_text().splitlines()) == 2
    for protocol in ("dpdd", "rgb"):
        assert run("--model", model, *pairs, "--csv", long, "--protocol", protocol) == 0
    rows = list(csv.DictReader(long.open()))
    assert [row["mae_output"] != "" for row in rows] == [True, False]
    assert [row["lpips_output"] for row in rows] == ["", ""]


def test_scores_of_images_replace_those_of_an_earlier_run_only(model, pairs, tmp_path, capsys):
    path, other = tmp_path / "images.csv", tmp_path / "other.csv"
    for protocol in ("rgb", "ipt-y"):
        assert run("--model", model, *pairs, "--per-image", path, "--protocol", protocol) == 0
    assert [row["protocol"] for row in csv.DictReader(path.open())] == ["ipt-y"] * 2
    other.write_text("mine\n")
    assert run("--model", model, *pairs, "--per-image", other) == 2
    assert "--per-image must be a new file" in capsys.readouterr().err and other.read_text() == "mine\n"


@pytest.fixture
def views(tmp_path):
    """Left views equal their targets; names belong together by order alone, as in DPDD."""
    for number in range(3):
        save(tmp_path / "left" / f"{2 * number}.png", number)
        save(tmp_path / "right" / f"{2 * number}.png", number + 7)
        save(tmp_path / "clear" / f"{2 * number + 1}.png", number)
    return ["--data", tmp_path / "left", "--second-view", tmp_path / "right", "--target", tmp_path / "clear"]


def test_two_views(views, tmp_path, capsys, monkeypatch):
    six = identity(tmp_path / "six", in_channels=6, out_channels=3)
    seen = []
    from ipt_fast.inference import Restorer

    call = Restorer.__call__
    monkeypatch.setattr(Restorer, "__call__", lambda self, image: (seen.append(image), call(self, image))[1])
    assert run("--model", six, *views, "--pair-by", "order", "--device", "cpu", "--json", tmp_path / "o.json") == 0
    capsys.readouterr()
    (evaluation,) = json.loads((tmp_path / "o.json").read_text())["evaluations"]
    assert [score["psnr_input"] for score in evaluation["scores"]] == [None] * 3  # infinite: the left view
    for number, image in enumerate(each for each in seen if each.shape[0] == 40):
        left, right = (
            np.asarray(PIL.Image.open(tmp_path / side / f"{2 * number}.png")) / 255 for side in ("left", "right")
        )
        np.testing.assert_array_equal(image, np.dstack([left, right]))
    assert number == 2
    assert run("--model", six, *views, "--device", "cpu") == 1  # by name nothing belongs together
    assert capsys.readouterr().err.count("target must hold an image by the name of each input") == 3


def test_the_number_of_views_is_that_of_the_model(views, model, tmp_path, capsys):
    six = identity(tmp_path / "six", in_channels=6, out_channels=3)
    assert run("--model", model, *views, "--device", "cpu") == 2
    assert "--second-view must be left out for a model of 3 channels; got" in capsys.readouterr().err
    assert run("--model", six, *views[:2], *views[4:], "--device", "cpu") == 2
    assert "--second-view must be given for a model of 6 channels; got None" in capsys.readouterr().err


def test_gray_views_count_as_colour(tmp_path, capsys):
    six = identity(tmp_path / "six", in_channels=6, out_channels=3)
    for side in ("left", "right"):
        save(tmp_path / side / "a.png", 1, (40, 36))
    save(tmp_path / "clear" / "a.png", 1)
    save(tmp_path / "left" / "b.png", 1)
    save(tmp_path / "right" / "b.png", 1, (39, 36, 3))
    save(tmp_path / "clear" / "b.png", 1)
    views = ["--data", tmp_path / "left", "--second-view", tmp_path / "right", "--target", tmp_path / "clear"]
    assert run("--model", six, *views, "--device", "cpu", "--protocol", "matlab-y") == 1
    captured = capsys.readouterr()
    assert captured.err.endswith("left/b.png: views must have one size; got (40, 36) and (39, 36)\n")
    assert " 1 " in captured.out.splitlines()[2]


def test_published_figures_beside_ours(model, tmp_path, capsys):
    save(tmp_path / "CBSD68" / "a.png", 1)
    data = ["--data", tmp_path / "CBSD68", "--sigma", 15, 12.5, "--device", "cpu"]
    assert run("--model", model, *data, "--published", "--json", tmp_path / "o.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split()[:4] == ["published:", "CBSD68,", "sigma", "15"]
    assert any(line.split()[:6] == ["IPT-V2,", "table", "1", "denoise", "IPT-V2", "Base"] for line in lines)
    assert "  differs: images: 1 here, 68 there" in lines and lines[-1] == "published: nothing for CBSD68, sigma 12.5"
    first, second = json.loads((tmp_path / "o.json").read_text())["published"]
    assert (
        first["dataset"] == "CBSD68" and len(first["rows"]) == 11 and first["differs"][0].startswith("images: 1 here")
    )
    assert second["rows"] == []
    assert run("--model", model, *data, "--published", "set12") == 0
    assert "published: Set12, sigma 15" in capsys.readouterr().out
    assert run("--model", model, *data, "--published", "Nothing") == 2
    assert "--published must be one of CBSD68, " in capsys.readouterr().err


def test_a_page_of_an_evaluation(model, tmp_path, capsys):
    save(tmp_path / "photos" / "a<b>.png", 1)
    save(tmp_path / "photos" / "gray.png", 2, (40, 36))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    page, data = tmp_path / "p.html", ["--data", tmp_path / "photos", "--sigma", 15, 50, "--device", "cpu"]
    assert run("--model", model, *data, "--html", page, "--html-size", 20) == 1
    text = page.read_text()
    assert is_page(page) and text.count("<h2>photos</h2>") == 2 and text.count("<figure>") == 4
    assert text.count("data:image/png") == 3 * 4 and "a&lt;b&gt;.png" in text and "a<b>" not in text
    assert text.count("<figure class=failed>") == 2 and "cannot read image" in text
    for caption in ("Gaussian noise of sigma 15", "Gaussian noise of sigma 50", " dB, SSIM 0."):
        assert caption in text
    assert run("--model", model, *data, "--html", page, "--limit", 1) == 0  # it may be replaced
    for wrong, message in ((tmp_path / "photos" / "gray.png", "--html must not overwrite an input"),
                           (tmp_path / "photos", "--html must be a file; got the folder")):  # fmt: skip
        assert run("--model", model, *data, "--html", wrong) == 2
        assert message in capsys.readouterr().err
    assert run("--model", model, *data, "--html", page, "--html-size", 3) == 2
    assert "--html-size must be at least 16; got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma", "25", "--pair-by", "order"], "--pair-by must be left out without --target; got order"),
        (["--sigma", "25", "--second-view", "x"], "--second-view must be left out without --target; got x"),
        (["--sigma", "25", "--lpips", "nowhere.pth"], "path must be a file of weights; got nowhere.pth"),
        (["--target", "{folder}/target", "--pair-by", "order"], "pair_by must be name for folders of [2, 1] images"),
    ],
)
def test_bad_arguments(model, tmp_path, capsys, options, message):
    for number in range(2):
        save(tmp_path / "photos" / f"{number}.png", number)
    save(tmp_path / "target" / "0.png", 0)
    options = [option.format(folder=tmp_path) for option in options]
    assert run("--model", model, "--data", tmp_path / "photos", "--device", "cpu", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
