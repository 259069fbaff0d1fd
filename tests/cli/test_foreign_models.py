"""`restore --model FILE` and `info --model FILE`: files of weights, ours and other people's."""

import re
import sys

import numpy as np
import pytest
import torch

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.data.io import Image, read_image, write_image
from ipt_fast.integrations.spandrel import load_file
from tests.models.micro import micro_model
from tests.oracles.foreign import load_foreign, spandrel, write_foreign


@pytest.fixture
def photos(tmp_path):
    """A photo with alpha, of 16 bit, and a gray one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(1000, 65536, (19, 27, 4)).astype(np.uint16)  # alpha hides no colours
    write_image(folder / "deep.png", Image(pixels[:, :, :3], pixels[:, :, 3]))
    write_image(folder / "gray.png", Image((pixels[:, :, :1] >> 8).astype(np.uint8)))
    return folder


def restore(model, source, out, *options):
    return main(["restore", str(source), str(out), "--model", str(model), "--device", "cpu", *map(str, options)])


OPTIONS = {"tile": 16, "overlap": 4, "blend": "average", "self_ensemble": True}


@pytest.mark.parametrize(("name", "suffix"), [("SwinIR", ".safetensors"), ("OmniSR", ".pth"), ("Compact", ".pt")])
def test_a_folder_by_files_of_other_people(name, suffix, photos, tmp_path, capsys):
    """Every option is that of `Restorer`, on the accelerated model; a second run finds all done."""
    file = write_foreign(tmp_path / f"model{suffix}", name)
    flags = ["--tile", 16, "--overlap", 4, "--blend", "average", "--self-ensemble", "--dtype", "float32"]
    assert restore(file, photos, tmp_path / "out", *flags) == 0
    descriptor = load_file(file)
    ipt_fast.accelerate(descriptor, verify=False)
    for photo in ("deep.png", "gray.png"):
        source, result = read_image(photos / photo), read_image(tmp_path / "out" / photo)
        expected = ipt_fast.restore(source.pixels, descriptor, dtype="float32", **OPTIONS)
        assert result.pixels.dtype == source.pixels.dtype and result.pixels.shape[:2] == (38, 54)
        np.testing.assert_array_equal(result.pixels, expected)
        assert (result.alpha is None) == (source.alpha is None)
    assert restore(file, photos, tmp_path / "out", *flags) == 0
    assert "skipped 2 of 2" in capsys.readouterr().out


def test_verbose_tells_what_is_accelerated(photos, tmp_path, capsys):
    file = write_foreign(tmp_path / "model.pth", "SwinIR")
    assert restore(file, photos / "gray.png", tmp_path / "out.png", "--verbose") == 0
    out, err = capsys.readouterr()
    assert "2 SwinTransformerBlock: SwinIR block" in out and "2 of 2 known modules run on the operators" in out
    assert re.search(r"^16 bit +bfloat16, float16$", out, re.MULTILINE) and not err


def test_what_cannot_be_accelerated_runs_as_it_is(photos, tmp_path, capsys, monkeypatch):
    def refuse(descriptor):
        raise ValueError("layers.0 (SwinTransformerBlock) has an error of 1.0 on the operators")

    monkeypatch.setattr("ipt_fast.cli._models.accelerate", refuse)
    file = write_foreign(tmp_path / "model.pth", "SwinIR")
    assert restore(file, photos / "gray.png", tmp_path / "out.png", "--dtype", "float32") == 0
    assert "model.pth runs as it is: layers.0 (SwinTransformerBlock) has an error of 1.0" in capsys.readouterr().err
    expected = ipt_fast.restore(read_image(photos / "gray.png").pixels, load_foreign("SwinIR"), dtype="float32")
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, expected)


def test_a_file_of_ours_needs_no_spandrel(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    model = micro_model()
    model.save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "model.safetensors"
    assert restore(file, photos / "deep.png", tmp_path / "out.png", "--dtype", "float32") == 0
    expected = ipt_fast.restore(read_image(photos / "deep.png").pixels, model, dtype="float32")
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, expected)
    assert main(["info", "--model", str(file)]) == 0
    out = capsys.readouterr().out
    assert "model    IPTV2, of ipt_fast" in out and "window_size 4" in out


def test_a_published_restormer_is_ours(photos, tmp_path, capsys, monkeypatch):
    """Its tensors tell all there is to know."""
    file = write_foreign(tmp_path / "model.pth", "Restormer")
    expected = ipt_fast.restore(read_image(photos / "gray.png").pixels, load_foreign("Restormer"), dtype="float32")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    assert restore(file, photos / "gray.png", tmp_path / "out.png", "--dtype", "float32") == 0
    found = read_image(tmp_path / "out.png").pixels
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert main(["info", "--model", str(file)]) == 0
    assert "model    Restormer, of ipt_fast" in capsys.readouterr().out


def test_wrong_files(photos, tmp_path, capsys, monkeypatch):
    spandrel()
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    file = write_foreign(tmp_path / "model.pth", "Compact")
    for model, options, message in (
        (tmp_path / "linear.pth", (), r"got .*linear.pth, whose 2 tensors, such as 'weight', it does not recognise"),
        (tmp_path / "none.pth", (), "must be a folder .* got .*none.pth"),
        (file, ("--raw-weights",), "--raw-weights must be left out without --checkpoint"),
        (file, ("--task", "denoise"), "task must be None for .*, which has no tasks"),
    ):
        assert restore(model, photos, tmp_path / "out", *options) == 2
        assert re.search(message, capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    assert restore(file, photos, tmp_path / "out") == 2
    assert re.search(r"got .*model.pth, which does not: .* pip install 'ipt-fast\[spandrel\]'", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_info_tells_what_a_file_is(tmp_path, capsys):
    file = write_foreign(tmp_path / "model.pth", "DAT")
    assert main(["info", "--model", str(file)]) == 0
    out = capsys.readouterr().out
    for line in ("does     SR, x2", "takes    3 channels, gives 3", "sizes    at least 16; tiles supported",
                 "16 bit   bfloat16", "modules  2 DATB: DAT block"):  # fmt: skip
        assert line in out.splitlines()
    assert out.startswith("model    DAT: light ")
    assert main(["info", "--model", "ipt_v2_tiny"]) == 0
    assert "model    IPTV2, of ipt_fast" in capsys.readouterr().out
