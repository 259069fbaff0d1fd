"""`ipt-fast restore`: files in, files out, and an exit status that tells."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.cli import main
from ipt_fast.data.io import Image, read_image, write_image
from ipt_fast.evaluation.protocols import get_protocol
from ipt_fast.inference import Restorer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a saved model whose residual branch is small, so that pictures stay recognisable."""
    torch.manual_seed(0)
    model = ipt_fast.create_model("ipt_v2_tiny", depths=(1, 1, 1, 1))
    with torch.no_grad():
        model.output.weight *= 0.01
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Three images of different kinds."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(60, 190, (24, 33, 4), np.uint8)
    write_image(folder / "colour.png", Image(pixels[:, :, :3], pixels[:, :, 3]))
    write_image(folder / "gray.jpg", Image(pixels[:, :, :1]))
    write_image(folder / "wide.tif", Image(np.ascontiguousarray(pixels[:9, :, :3])))
    return folder


def names(folder):
    """Of what a user sees."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_file_to_file(run, photos, tmp_path, capsys):
    assert run(photos / "colour.png", tmp_path / "new" / "out.tif") == 0
    source, output = read_image(photos / "colour.png"), read_image(tmp_path / "new" / "out.tif")
    assert output.pixels.shape == source.pixels.shape
    np.testing.assert_array_equal(output.alpha, source.alpha)
    assert 0 < np.abs(output.pixels.astype(int) - source.pixels).max() < 60
    assert "restored 1, skipped 0, failed 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"tile": 16, "overlap": 6},
        {"tile": 16, "blend": "average"},
        {"tile": 16, "self_ensemble": True},
    ],
)
def test_result_is_that_of_restore(run, model, photos, tmp_path, options):
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    assert run(photos / "colour.png", tmp_path / "out", "--dtype", "float32", *flags) == 0
    image, opened = read_image(photos / "colour.png").pixels, ipt_fast.models.open_model(model)
    restored = read_image(tmp_path / "out" / "colour.png").pixels
    np.testing.assert_array_equal(restored, ipt_fast.restore(image, opened, dtype="float32", **options))
    for left_out in options.keys() - {"tile"}:  # every option must have changed the result
        fewer = {name: value for name, value in options.items() if name != left_out}
        assert (restored != ipt_fast.restore(image, opened, dtype="float32", **fewer)).any(), left_out


def test_noise_is_that_of_the_rgb_protocol(run, model, photos, tmp_path):
    assert run(photos / "colour.png", tmp_path / "out.png", "--noise", 80, "--dtype", "float32") == 0
    noisy = get_protocol("rgb").add_noise(read_image(photos / "colour.png").pixels / 255, 80)
    expected = ipt_fast.restore(noisy, ipt_fast.models.open_model(model), dtype="float32").clip(0, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, np.rint(expected * 255))


def test_warnings_are_printed_with_the_file(run, photos, tmp_path, capsys, monkeypatch):
    def warn(self, image):
        warnings.warn("a tile came out non-finite", stacklevel=2)
        return image

    monkeypatch.setattr(Restorer, "__call__", warn)
    assert run(photos / "colour.png", tmp_path / "out.png") == 0
    assert "colour.png: warning: a tile came out non-finite" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["", "*.*"])
def test_folder_and_glob_to_folder(run, photos, tmp_path, pattern):
    (photos / "notes.txt").write_text("not an image")
    assert run(f"{photos}/{pattern}", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["colour.png", "gray.jpg", "wide.tif"]
    assert read_image(tmp_path / "out" / "gray.jpg").pixels.shape[2] == 1


def test_existing_outputs_are_skipped_unless_overwritten(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "gray.jpg").write_bytes(b"mine")
    for summary in ("restored 2, skipped 0, failed 1", "restored 0, skipped 2, failed 1"):
        assert run(photos, out) == 1
        assert (out / "gray.jpg").read_bytes() == b"mine"
        captured = capsys.readouterr()
        assert summary in captured.out
        assert f"gray.jpg: error: {out}/gray.jpg exists, and is not known to be made of this image" in captured.err
    assert run(photos, out, "--overwrite") == 0
    assert run(photos, out) == 0
    assert "skipped 3 of 3" in capsys.readouterr().out
    assert read_image(out / "gray.jpg").pixels.shape == (24, 33, 1)


def test_one_bad_file_does_not_stop_the_run(run, photos, tmp_path, capsys):
    (photos / "bad.png").write_bytes((photos / "colour.png").read_bytes()[:60])
    (photos / "empty.jpg").write_bytes(b"")
    assert run(photos, tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["colour.png", "gray.jpg", "wide.tif"]
    captured = capsys.readouterr()
    assert "restored 3, skipped 0, failed 2" in captured.out
    assert "bad.png: error: cannot read image" in captured.err and "empty.jpg: error:" in captured.err


def test_format_that_cannot_hold_the_image(run, photos, tmp_path, capsys):
    assert run(photos / "colour.png", tmp_path / "out.jpg") == 1
    assert "for an image with alpha; got" in capsys.readouterr().err and not (tmp_path / "out.jpg").exists()


def test_sixteen_bit_is_kept(run, tmp_path):
    pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(0).integers(20000, 40000, (20, 20, 3), np.uint16)
    write_image(tmp_path / "deep.png", Image(pixels))
    assert run(tmp_path / "deep.png", tmp_path / "out") == 0
    output = read_image(tmp_path / "out" / "deep.png").pixels
    assert output.dtype == np.uint16 and len(np.unique(output)) > 256


def test_a_result_too_large_for_its_format_is_told_before_the_work(run, tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "wide.png", Image(np.zeros((1, 16384, 3), np.uint8)))
    monkeypatch.setattr(Restorer, "__call__", lambda self, image: image[:1] if image.size < 99 else pytest.fail("work"))
    assert run(tmp_path / "wide.png", tmp_path / "out.webp") == 1
    assert "for an image of 16384 x 1 pixels; got" in capsys.readouterr().err and not (tmp_path / "out.webp").exists()


@pytest.mark.parametrize("compare, longest", [([], 255), (["--compare"], 247)])
def test_names_are_checked_before_the_work(run, photos, tmp_path, capsys, compare, longest):
    out = tmp_path / "out"
    name = "n" * (longest - 4) + ".png"
    assert run(photos / "wide.tif", out / f"n{name}", *compare) == 2
    assert "must have a name of at most 255 bytes" in capsys.readouterr().err and not out.exists()
    assert run(photos / "wide.tif", out / name, *compare) == 0
    assert len(names(out)) == 1 + len(compare)


def test_max_pixels_allows_a_scan(run, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    assert run(photos / "colour.png", tmp_path / "out.png") == 1
    assert "must have at most max_pixels = 200 pixels" in capsys.readouterr().err
    assert run(photos / "colour.png", tmp_path / "out.png", "--max-pixels", 24 * 33) == 0
    for wrong in (0, -1):
        assert run(photos / "colour.png", tmp_path / "no.png", "--max-pixels", wrong) == 2
        assert f"--max-pixels must be at least 1; got {wrong}" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_a_wrong_call(run, photos, tmp_path, capsys):
    name = "n" * 252 + ".png"
    assert run(photos / "colour.png", tmp_path / name) == 2
    assert f"path must have a name of at most 255 bytes; got {tmp_path / name}" in capsys.readouterr().err


def test_target_prints_psnr_and_compare_shows_it(run, photos, tmp_path, capsys):
    targets = tmp_path / "targets"
    targets.mkdir()
    for path in photos.iterdir():
        image = read_image(path)
        write_image(targets / f"{path.stem}.png", Image(np.minimum(image.pixels, 180)))
    assert run(photos, tmp_path / "out", "--target", targets, "--compare") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "PSNR" in line]
    assert len(lines) == 3 and all(line.count(" dB") == 2 for line in lines)
    assert names(tmp_path / "out") == sorted(
        [f"{name}_compare.png" for name in ("colour", "gray", "wide")] + ["colour.png", "gray.jpg", "wide.tif"]
    )
    assert run(photos / "wide.tif", tmp_path / "plain.png", "--compare") == 0
    three, two = (
        read_image(path).pixels for path in (tmp_path / "out/wide_compare.png", tmp_path / "plain_compare.png")
    )
    assert three.shape[1] > two.shape[1]


def test_noise_makes_the_input_the_target(run, photos, tmp_path, capsys):
    assert run(photos / "colour.png", tmp_path / "out.png", "--noise", 25) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "PSNR" in line)
    before = float(line.split("PSNR ")[1].split(" dB")[0])
    assert before == pytest.approx(20.17, abs=0.3)  # 20 log10(255 / 25)


def test_missing_target_fails_that_image(run, photos, tmp_path, capsys):
    targets = tmp_path / "targets"
    targets.mkdir()
    write_image(targets / "gray.png", Image(read_image(photos / "gray.jpg").pixels))
    write_image(targets / "wide.png", Image(read_image(photos / "gray.jpg").pixels))
    assert run(photos, tmp_path / "out", "--target", targets) == 1
    error = capsys.readouterr().err
    assert (
        "colour.png: error: --target must hold an image by the name of each input" in error
        and "must have shape (9, 33, 3)" in error
    )
    assert names(tmp_path / "out") == ["gray.jpg"]


def test_checkpoint_of_either_form(tmp_path, photos, capsys):
    torch.manual_seed(0)
    model = ipt_fast.create_model("ipt_v2_tiny")
    torch.save({"params_ema": model.state_dict()}, tmp_path / "branches.pth")
    model.reparameterize()
    torch.save(model.state_dict(), tmp_path / "merged.pth")
    outputs = []
    for name in ("branches", "merged"):
        out = tmp_path / f"{name}.png"
        assert main(["restore", str(photos / "wide.tif"), str(out), "--checkpoint", str(tmp_path / f"{name}.pth")]) == 0
        outputs.append(read_image(out).pixels.astype(int))
    assert np.abs(outputs[0] - outputs[1]).max() <= 1
    (tmp_path / "torn.pth").write_bytes(b"torn")
    arguments = [
        "restore",
        str(photos / "wide.tif"),
        str(tmp_path / "x.png"),
        "--checkpoint",
        str(tmp_path / "torn.pth"),
    ]
    assert main(arguments) == 2
    assert "torn.pth" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_backends(run, photos, tmp_path, backend):
    assert run(photos / "wide.tif", tmp_path / "out.png", "--backend", backend) == 0


@pytest.mark.parametrize(("value", "message"), [("cuda", "cannot run"), ("bogus", "IPT_FAST_BACKEND must be one of")])
def test_backend_of_the_environment(run, photos, tmp_path, capsys, monkeypatch, value, message):
    monkeypatch.setenv("IPT_FAST_BACKEND", value)
    assert run(photos / "wide.tif", tmp_path / "out.png") == 2
    assert message in capsys.readouterr().err
    assert run(photos / "wide.tif", tmp_path / "out.png", "--backend", "reference") == 0


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
def test_the_kernels_of_the_environment_restore_a_model_in_training_form(run, photos, tmp_path, monkeypatch):
    """Merging it is in float64, for which there are no kernels."""
    monkeypatch.setenv("IPT_FAST_BACKEND", "cpu")
    assert run(photos / "wide.tif", tmp_path / "out.png", "--dtype", "float32") == 0


def test_missing_comparison_is_not_already_restored(run, photos, tmp_path):
    assert run(photos / "wide.tif", tmp_path / "out") == 0
    assert run(photos / "wide.tif", tmp_path / "out", "--compare") == 0
    assert (tmp_path / "out" / "wide_compare.png").exists()


def test_backend_that_cannot_run_is_a_wrong_call(run, photos, tmp_path, capsys):
    assert run(photos, tmp_path / "out", "--backend", "cuda") == 2  # and --device cpu
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "backend 'cuda' cannot run" in captured.err and not captured.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out.gif", "out.pgn", "new/out.jp2"])
def test_unknown_suffix_is_no_new_folder(run, photos, tmp_path, capsys, name):
    assert run(photos / "colour.png", tmp_path / name) == 2
    assert "path must end in .png" in capsys.readouterr().err
    assert names(tmp_path) == ["photos"]


def test_existing_folder_may_have_any_name(run, photos, tmp_path):
    (tmp_path / "out.gif").mkdir()
    assert run(photos / "wide.tif", tmp_path / "out.gif") == 0
    assert names(tmp_path / "out.gif") == ["wide.tif"]


@pytest.mark.parametrize("name", ["results.v2", "results.png"])
def test_a_new_folder_with_a_dot(run, photos, tmp_path, name):
    assert run(photos / "wide.tif", f"{tmp_path}/{name}/") == 0
    assert run(photos / "wide.tif", photos / "gray.jpg", f"{tmp_path}/{name}/") == 0
    assert names(tmp_path / name) == ["gray.jpg", "wide.tif"]


@pytest.mark.parametrize("out", [os.devnull, "/dev/fd/1", "text", "text.png/"])
def test_outputs_that_are_neither_a_folder_nor_an_image(run, photos, tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for name in ("text", "text.png"):
        (tmp_path / name).write_text("in the way")
    assert run(photos / "wide.tif", out) == 2
    message = f"OUT must be a folder, or a file with a suffix that says its format; got {out}"
    assert capsys.readouterr().err == f"ipt-fast: error: {message}\n"
    assert run(photos, out) == 2
    assert f"OUT must be a folder for several images; got {Path(out)}" in capsys.readouterr().err


def test_inputs_that_are_streams(run, tmp_path, capsys):
    read, write = os.pipe()
    assert run(f"/dev/fd/{read}", tmp_path / "out.png") == 2
    message = f"images must be files, which can be read twice; got /dev/fd/{read}, which is a pipe or a device"
    assert capsys.readouterr().err == f"ipt-fast: error: {message}\n"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("pattern", ["", "*.*"])
def test_hidden_files_and_folders_are_left_out(run, photos, tmp_path, pattern):
    (photos / "._wide.tif").write_bytes(b"of another system")
    (photos / "album.png").mkdir()
    assert run(f"{photos}/{pattern}", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["colour.png", "gray.jpg", "wide.tif"]


def test_inputs_are_never_overwritten(run, photos, capsys):
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    for arguments in (
        [photos, photos],
        [photos / "colour.png", photos / "colour.png"],
        [photos / "wide.tif", photos / ".." / "photos"],
    ):
        assert run(*arguments, "--overwrite") == 2
        assert "OUT must not overwrite an input; got" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before


def test_two_images_never_become_one_file(run, photos, tmp_path, capsys):
    (photos / "more").mkdir()
    write_image(photos / "more" / "wide.tif", Image(np.zeros((4, 4, 3), np.uint8)))
    assert run(f"{photos}/**/*.tif", tmp_path / "out") == 2
    assert "OUT must have a place for each output; got" in capsys.readouterr().err


def test_unwritable_folder_is_told_before_any_work(run, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(photos, tmp_path / "file" / "out") == 2
    assert "OUT must be a folder that can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{photos}", "{out}.png"], "OUT must be a folder for several images"),
        (["{photos}/none*.png", "{out}"], "images must be a file, a folder or a pattern"),
        (["{photos}/none.png", "{out}"], "images must be a file, a folder or a pattern"),
        (["{photos}", "{out}", "--target", "{photos}/none"], "--target must be an image or a folder of images"),
        (["{photos}", "{out}", "--target", "{photos}/gray.jpg"], "--target must be a folder for several images"),
        (["{photos}", "{out}", "--noise", "5", "--target", "{photos}"], "--target must be left out with --noise"),
        (["{photos}", "{out}", "--noise", "-5"], "--noise must be finite and at least 0"),
        (["{photos}", "{out}", "--tile", "3"], "tile must be"),
        (["{photos}", "{out}", "--task", "denoise"], "task must be None for IPTV2"),
        (["{photos}", "{out}", "--device", "nowhere"], "device must be usable; got nowhere"),
    ],
)
def test_wrong_calls_exit_with_2(run, photos, tmp_path, capsys, arguments, message):
    arguments = [argument.format(photos=photos, out=tmp_path / "out") for argument in arguments]
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*/*"))


def test_unknown_model_and_bad_tile_exit_with_2(photos, tmp_path, capsys):
    assert main(["restore", str(photos), str(tmp_path / "out"), "--model", "unknown"]) == 2
    assert "unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["restore", str(photos), str(tmp_path / "out"), "--tile", "big"])
    assert exit.value.code == 2 and "must be auto, whole, a size" in capsys.readouterr().err
