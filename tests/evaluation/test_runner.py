"""Evaluating a folder: pairs and noise, limits, failures, and the files that record it."""

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from benchmarks import results
from ipt_fast.data.files import list_images
from ipt_fast.data.io import Image, write_image
from ipt_fast.evaluation.protocols import PROTOCOLS, get_protocol
from ipt_fast.evaluation.report import CSV_COLUMNS, append_csv, cpu_name, environment, format_table, write_json
from ipt_fast.evaluation.runner import Evaluation, ImageScore, dataset_names, evaluate, read_float


def identity(image):
    return image


def save(path, seed=0, size=(20, 26), channels=3):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(60, 200, (*size, channels), dtype=np.uint8)
    PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(["b.png", "a.png", "c.bmp"]):
        save(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_noise_is_measured_before_and_after(folder):
    evaluation = evaluate(identity, folder, "rgb", sigma=25)
    assert [score.image for score in evaluation.scores] == ["a.png", "b.png", "c.bmp"]
    assert (evaluation.dataset, evaluation.protocol, evaluation.sigma) == ("photos", "rgb", 25)
    assert evaluation.failures == ()
    rgb = get_protocol("rgb")
    for score, path in zip(evaluation.scores, list_images(folder), strict=True):
        clean = read_float(path)
        noisy = rgb.add_noise(clean, 25)
        assert (score.psnr_input, score.ssim_input) == pytest.approx(rgb.score_input(noisy, clean))
        assert (score.psnr_output, score.ssim_output) == pytest.approx(rgb.score_output(noisy, clean))
    mean = sum(score.psnr_input for score in evaluation.scores) / 3
    assert evaluation.mean("psnr_input") == pytest.approx(mean)
    assert mean == pytest.approx(20.17, abs=0.3)


def test_a_paired_set(tmp_path):
    """Targets are found by name whatever their format; the input is scored as it is."""
    save(tmp_path / "input" / "x.bmp", seed=1)
    save(tmp_path / "target" / "x.png", seed=2)
    evaluation = evaluate(identity, tmp_path / "input", "ipt-y", target=tmp_path / "target", crop=3)
    (score,) = evaluation.scores
    images = read_float(tmp_path / "input" / "x.bmp"), read_float(tmp_path / "target" / "x.png")
    expected = get_protocol("ipt-y").score_input(*images, crop=3)
    assert (score.psnr_input, score.ssim_input) == pytest.approx(expected)
    assert (score.psnr_output, score.ssim_output) == pytest.approx(expected)
    assert (evaluation.dataset, evaluation.sigma) == (f"{tmp_path.name}/input", None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_input_equal_to_its_target_has_infinite_psnr(folder, protocol):
    for score in evaluate(identity, folder, protocol, target=folder).scores:
        assert score.psnr_input == score.psnr_output == float("inf")
        assert score.ssim_input == pytest.approx(1)


def test_noise_is_the_same_for_float32_and_float64_images(folder):
    clean = read_float(folder / "a.png")
    noisy = get_protocol("rgb").add_noise(clean, 25)
    assert (noisy == get_protocol("rgb").add_noise(clean.astype(np.float32), 25)).all()


def test_the_output_is_what_is_scored(folder):
    evaluation = evaluate(lambda image: np.full_like(image, 0.5), folder, sigma=25, limit=1)
    clean = read_float(folder / "a.png")
    expected = get_protocol("rgb").score_output(np.full_like(clean, 0.5), clean)
    assert (evaluation.scores[0].psnr_output, evaluation.scores[0].ssim_output) == pytest.approx(expected)


def test_limit_takes_the_first_by_name(folder):
    scores = evaluate(identity, folder, sigma=25, limit=2).scores
    assert [score.image for score in scores] == ["a.png", "b.png"]


def test_16_bits_keep_their_precision(tmp_path):
    pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(0).integers(0, 65536, (12, 12), dtype=np.uint16)
    write_image(tmp_path / "deep.png", Image(pixels[:, :, None]))
    read = read_float(tmp_path / "deep.png")
    assert read.shape == (12, 12, 1)
    assert read[..., 0] == pytest.approx(pixels / 65535, abs=1e-7)


def test_bad_files_are_reported_and_the_others_go_on(tmp_path):
    inputs, targets = tmp_path / "input", tmp_path / "target"
    for name in ("damaged.png", "good.png", "lonely.png", "other_size.png", "small.png"):
        save(inputs / name)
        save(targets / name, seed=1)
    (inputs / "damaged.png").write_bytes((inputs / "damaged.png").read_bytes()[:200])
    (targets / "lonely.png").unlink()
    save(targets / "other_size.png", size=(20, 25))
    save(inputs / "small.png", size=(8, 30))
    save(targets / "small.png", size=(8, 30))
    evaluation = evaluate(identity, inputs, target=targets)
    assert [score.image for score in evaluation.scores] == ["good.png"]
    reasons = dict(evaluation.failures)
    assert list(reasons) == ["damaged.png", "lonely.png", "other_size.png", "small.png"]
    assert "damaged.png" in reasons["damaged.png"]
    assert "target must hold an image by the name" in reasons["lonely.png"]
    assert "(20, 26, 3) and (20, 25, 3)" in reasons["other_size.png"]
    assert "at least 11x11 pixels for SSIM; got 8x30" in reasons["small.png"]


@pytest.mark.parametrize("failure", [RuntimeError("no memory is left"), MemoryError()])
def test_an_image_that_cannot_be_restored_is_reported_and_the_others_go_on(folder, failure):
    save(folder / "large.png", size=(40, 20))

    def restorer(image):
        if image.shape[0] == 40:
            raise failure
        return image

    evaluation = evaluate(restorer, folder, sigma=25)
    assert evaluation.failures == (("large.png", str(failure) or "MemoryError"),)
    assert [score.image for score in evaluation.scores] == ["a.png", "b.png", "c.bmp"]


def test_hidden_files_and_folders_are_no_images(folder):
    expected = list_images(folder)
    save(folder / "._a.png")
    (folder / "album.png").mkdir()
    assert list_images(folder) == expected
    (folder / "album.png" / ".x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="folder must hold images"):
        list_images(folder / "album.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "psnr"}, "protocol must be one of rgb"),
        ({"sigma": None}, "exactly one of sigma"),
        ({"target": "somewhere"}, "exactly one of sigma"),
        ({"sigma": 0}, "sigma must be positive and finite; got 0"),
        ({"sigma": float("nan")}, "sigma must be positive"),
        ({"crop": -1}, "crop must be at least 0; got -1"),
        ({"limit": 0}, "limit must be at least 1; got 0"),
    ],
)
def test_bad_arguments(folder, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(identity, folder, **{"sigma": 25, **change})


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="folder must exist"):
        evaluate(identity, tmp_path / "nowhere", sigma=25)
    with pytest.raises(ValueError, match="folder must hold images"):
        evaluate(identity, tmp_path, sigma=25)


def an_evaluation(sigma=25.0):
    scores = (ImageScore("a.png", 20.0, 30.0, 0.4, 0.8), ImageScore("b.png", 21.0, 32.0, 0.5, 0.9))
    return Evaluation("photos", "rgb", sigma, scores, (("c.png", "cannot read"),))


def test_csv_rows_are_added(tmp_path):
    path = tmp_path / "results.csv"
    append_csv(path, "tiny", [an_evaluation()])
    append_csv(path, "folder, with comma", [an_evaluation(sigma=None)])
    assert path.read_text().splitlines() == [
        "model,dataset,protocol,sigma,images,psnr_input,psnr_output,ssim_input,ssim_output",
        "tiny,photos,rgb,25,2,20.5000,31.0000,0.4500,0.8500",
        '"folder, with comma",photos,rgb,,2,20.5000,31.0000,0.4500,0.8500',
    ]
    assert os.listdir(tmp_path) == ["results.csv"]


def test_csv_has_no_row_of_no_images(tmp_path):
    path = tmp_path / "results.csv"
    append_csv(path, "tiny", [Evaluation("bad", "rgb", 25.0, (), (("c.png", "cannot read"),)), an_evaluation()])
    assert [line.split(",")[1] for line in path.read_text().splitlines()] == ["dataset", "photos"]


def test_earlier_csv_rows_keep_their_bytes(tmp_path):
    path = tmp_path / "results.csv"
    before = ",".join(CSV_COLUMNS).encode() + b"\r\nm\xfcller,photos,rgb,25,1,1,1,1,1\r\n"
    path.write_bytes(before)
    append_csv(path, "tiny", [an_evaluation()])
    assert path.read_bytes() == before + b"tiny,photos,rgb,25,2,20.5000,31.0000,0.4500,0.8500\r\n"


@pytest.mark.parametrize("content", [b"name,value\nx,1\n", b"\x89PNG\r\n\x1a\n"])
def test_a_csv_file_of_another_kind_is_left_alone(tmp_path, content):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"results.csv must have the columns {','.join(CSV_COLUMNS)}; got others"):
        append_csv(path, "tiny", [an_evaluation()])
    assert path.read_bytes() == content


def test_json_holds_everything(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, "tiny", {"tile": None, "dtype": "auto"}, [an_evaluation()])
    content = json.loads(path.read_text())
    assert content["model"] == "tiny"
    assert content["settings"] == {"tile": None, "dtype": "auto"}
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["cpu"]
    (evaluation,) = content["evaluations"]
    assert evaluation["mean"] == pytest.approx(
        {"psnr_input": 20.5, "psnr_output": 31.0, "ssim_input": 0.45, "ssim_output": 0.85}
    )
    assert evaluation["scores"][1]["psnr_output"] == 32.0
    assert evaluation["failures"] == [["c.png", "cannot read"]]


def test_json_has_null_for_what_is_not_finite(tmp_path):
    """NaN and Infinity are not JSON."""
    path = tmp_path / "results.json"
    equal = Evaluation("photos", "rgb", None, (ImageScore("a.png", 20.0, float("inf"), 0.4, 1.0),), ())
    write_json(path, "tiny", {"tile": None}, [equal, Evaluation("bad", "rgb", 25.0, (), ())])
    content = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    measured, empty = content["evaluations"]
    assert (measured["mean"]["psnr_input"], measured["mean"]["psnr_output"]) == (20.0, None)
    assert measured["scores"][0]["psnr_output"] is None
    assert set(empty["mean"].values()) == {None}


def test_benchmarks_and_evaluations_name_the_same_processor():
    assert results.environment()["cpu"] == environment()["cpu"] == cpu_name() != ""


def test_table():
    lines = format_table([an_evaluation(), an_evaluation(sigma=None)]).splitlines()
    assert lines[0].split() == ["dataset", "sigma", "images", "PSNR", "in", "PSNR", "out", "SSIM", "in", "SSIM", "out"]
    assert lines[1].split() == ["photos", "25", "2", "20.50", "31.00", "0.4500", "0.8500"]
    assert lines[2].split()[1] == "-"


def test_an_evaluation_without_scores_has_no_mean():
    assert np.isnan(Evaluation("photos", "rgb", 25.0, (), ()).mean("psnr_output"))


@pytest.mark.skipif("IPT_FAST_DATA" not in os.environ, reason="IPT_FAST_DATA does not name the folder of test images")
def test_noise_on_cbsd68():
    """The published input PSNR at sigma 25 is 20.17 dB."""
    rgb = get_protocol("rgb")
    images = [read_float(path) for path in list_images(Path(os.environ["IPT_FAST_DATA"]) / "denoise" / "CBSD68")]
    assert len(images) == 68
    scores = [rgb.score_input(rgb.add_noise(image, 25), image)[0] for image in images[::8]]
    assert np.mean(scores) == pytest.approx(20.17, abs=0.02)


HEADER = ",".join(CSV_COLUMNS).encode()
OLD, NEW = b"old,photos,rgb,25,1,1,1,1,1", b"tiny,photos,rgb,25,2,20.5000,31.0000,0.4500,0.8500"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (HEADER, [HEADER, NEW]),
        (HEADER + b"\n" + OLD, [HEADER, OLD, NEW]),
        (b"\xef\xbb\xbf" + HEADER + b"\n" + OLD + b"\n", [b"\xef\xbb\xbf" + HEADER, OLD, NEW]),
        (HEADER + b"\n" + OLD + b"\na note of mine\n", [HEADER, OLD, b"a note of mine", NEW]),
        (HEADER + b"\n\n" + OLD + b"\r\n", [HEADER, b"", OLD, NEW]),
        (HEADER + b"\r" + OLD, [HEADER, OLD, NEW]),
        (HEADER + b'\n"a,b\nc",photos,rgb,25,1,1,1,1,1\n', [HEADER, b'"a,b', b'c",photos,rgb,25,1,1,1,1,1', NEW]),
        (b"\n", [HEADER, NEW]),
        (b"\xef\xbb\xbf", [b"\xef\xbb\xbf" + HEADER, NEW]),
        (b"\xef\xbb\xbf\r\n", [b"\xef\xbb\xbf" + HEADER, NEW]),
    ],
)
def test_rows_are_added_to_tables_as_people_leave_them(tmp_path, before, after):
    path = tmp_path / "results.csv"
    path.write_bytes(before)
    append_csv(path, "tiny", [an_evaluation()])
    assert path.read_bytes() == b"".join(line + b"\n" for line in after)


def test_all_lines_end_as_the_first(tmp_path):
    path = tmp_path / "results.csv"
    path.write_bytes(HEADER + b"\r\n" + OLD + b"\n" + OLD)
    append_csv(path, "tiny", [an_evaluation()])
    assert path.read_bytes() == b"".join(line + b"\r\n" for line in (HEADER, OLD, OLD, NEW))


@pytest.mark.parametrize(
    "content",
    [
        HEADER.replace(b",", b";") + b"\n",
        b"measured at home\n" + HEADER + b"\n",
        HEADER + b"\n" + OLD + b"\0\0\n",
        (HEADER + b"\n").decode().encode("utf-16"),
        HEADER + b'\n"a quote without an end\n' + OLD + b"\n",
    ],
)
def test_tables_that_would_be_spoilt_are_refused_by_name(tmp_path, content):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="results.csv must "):
        append_csv(path, "tiny", [an_evaluation()])
    assert path.read_bytes() == content


def test_targets_that_share_a_stem(tmp_path):
    for name, seed in (("1.png", 1), ("1.bmp", 2), ("2.png", 3)):
        save(tmp_path / "input" / name, seed)
        save(tmp_path / "target" / name, seed)
    save(tmp_path / "target" / "2.bmp", 4)
    save(tmp_path / "input" / "3.png", 5)
    save(tmp_path / "target" / "3.bmp", 5)
    save(tmp_path / "target" / "3.tif", 6)
    evaluation = evaluate(identity, tmp_path / "input", target=tmp_path / "target", limit=4)
    assert [(score.image, score.psnr_input) for score in evaluation.scores] == [
        ("1.bmp", float("inf")),
        ("1.png", float("inf")),
        ("2.png", float("inf")),
    ]
    ((name, reason),) = evaluation.failures
    assert name == "3.png" and "got 3.bmp, 3.tif for 3.png" in reason


def test_two_inputs_of_one_target_are_ambiguous_even_beyond_the_limit(tmp_path):
    for name in ("1.bmp", "1.png"):
        save(tmp_path / "input" / name)
    save(tmp_path / "target" / "1.tif")
    evaluation = evaluate(identity, tmp_path / "input", target=tmp_path / "target", limit=1)
    assert not evaluation.scores and "got 1.tif for 1.bmp, 1.png" in evaluation.failures[0][1]


def test_names_of_data_sets_tell_them_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/test", "b/test", "b/c/test", "x", "a/../a/test")]
    assert dataset_names(folders) == ["a/test", "b/test", "c/test", "x", "a/test"]
    assert dataset_names([tmp_path / "a/x/test", tmp_path / "b/x/test"]) == ["a/x/test", "b/x/test"]
    assert dataset_names(["/", "/x"]) == ["/", "x"]
