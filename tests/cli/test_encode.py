"""``ipt-fast encode``: latents of images and of flipped ones, kept and taken up again; bad images; what is refused."""

import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from ipt_fast.cli import encode, main
from ipt_fast.data.labelled import ClassImages
from ipt_fast.data.latents import CachedLatents, is_latents, shard_metadata
from ipt_fast.diffusion.vae import open_vae
from tests.cli.generators import TINY_DIT
from tests.diffusion.tiny_vae import save_tiny_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def images(tmp_path):
    """Two classes, of 3 and 2 images."""
    draw = np.random.default_rng(0)
    for name in ("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(draw.integers(0, 256, (20, 17, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def run(vae, images, tmp_path):
    def call(*options, out=tmp_path / "out"):
        arguments = ["encode", images, out, "--vae", vae, "--size", 8, "--device", "cpu", "--shard-size", 2, *options]
        return main([*map(str, arguments)])

    return call


def all_of(folder, mirrored=False):
    latents = CachedLatents(folder)
    return torch.stack([latents.example(number, mirrored)[0] for number in range(len(latents))])


def squares(folder):
    return torch.stack([image.float() / 127.5 - 1 for image in ClassImages(folder, 8)])


def test_latents_of_images_and_of_flipped_ones(run, images, vae, tmp_path, capsys):
    assert run() == 0
    assert f"{tmp_path / 'out'}: 5 latents of shape (4, 4, 4), 2 classes, skipped 0 images" in capsys.readouterr().out
    latents = CachedLatents(tmp_path / "out")
    assert latents.classes == ("cat", "dog") and latents.labels.tolist() == [0, 0, 0, 1, 1]
    assert latents.info.mirrored and latents.info.image_size == 8 and latents.info.vae["scaling_factor"] == 0.18215
    assert [*latents.shards.values()] == [2, 2, 1]
    values, opened = squares(images), open_vae(vae)
    torch.testing.assert_close(all_of(tmp_path / "out"), opened.encode(values))
    torch.testing.assert_close(all_of(tmp_path / "out", True), opened.encode(values.flip(-1)))


def test_without_flipped_ones_and_in_half_precision(run, images, vae, tmp_path):
    assert run("--no-flip", "--dtype", "bfloat16", "--batch-size", 1) == 0
    assert not CachedLatents(tmp_path / "out").info.mirrored
    expected = open_vae(vae).encode(squares(images)).bfloat16().float()
    torch.testing.assert_close(all_of(tmp_path / "out"), expected, rtol=2**-8, atol=1e-6)


def test_draws_differ_by_seed_image_and_side_and_by_nothing_else(run, tmp_path):
    assert run("--draw", "--batch-size", 4, "--workers", 1) == 0
    assert run("--draw", "--batch-size", 1, out=tmp_path / "again") == 0
    assert run("--draw", "--seed", 1, out=tmp_path / "other") == 0
    assert run(out=tmp_path / "mean") == 0
    drawn, mean = all_of(tmp_path / "out"), all_of(tmp_path / "mean")
    torch.testing.assert_close(drawn, all_of(tmp_path / "again"))
    assert not torch.allclose(drawn, all_of(tmp_path / "other"), atol=1e-2)
    noise = drawn - mean
    mirrored = all_of(tmp_path / "out", True) - all_of(tmp_path / "mean", True)
    assert not torch.allclose(noise[0], noise[1], atol=1e-2) and not torch.allclose(noise, mirrored, atol=1e-2)


def test_bad_images_are_named_skipped_and_counted(run, images, tmp_path, capsys):
    (images / "cat" / "1.png").write_bytes(b"nonsense")
    assert run() == 1
    printed = capsys.readouterr()
    assert f"{images / 'cat' / '1.png'}: error: cannot read image" in printed.err
    assert "4 latents of shape (4, 4, 4), 2 classes, skipped 1 images" in printed.out
    assert CachedLatents(tmp_path / "out").labels.tolist() == [0, 0, 1, 1]
    assert run() == 1  # it is known, though nothing is read again
    assert "skipped 1 images" in capsys.readouterr().out


def test_a_stopped_run_goes_on(run, tmp_path, capsys, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(out=whole) == 0
    write = encode.write_shard

    def stop(folder, number, *args, **kwargs):
        if number == 1:
            raise KeyboardInterrupt
        write(folder, number, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(encode, "write_shard", stop)
        assert run() == 130
    assert os.listdir(out) == ["00000.safetensors"] and not is_latents(out)
    (out / ".0123456789abcdef.safetensors").write_bytes(b"left by a kill")
    inode = (out / "00000.safetensors").stat().st_ino
    capsys.readouterr()
    assert run() == 0
    assert "kept 1 of 3 files, which an earlier run made" in capsys.readouterr().out
    assert (out / "00000.safetensors").stat().st_ino == inode
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    for name in os.listdir(out):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_damaged_file_is_made_again_only_where_it_is_known(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run() == 0
    assert run("--draw") == 2
    assert "OUT must be a new folder, or hold latents of these images with these options" in capsys.readouterr().err
    before = (out / "00000.safetensors").read_bytes()
    assert run("--draw", "--overwrite", "--shard-size", 3) == 0
    assert [*CachedLatents(out).shards.values()] == [3, 2] and not (out / "00002.safetensors").exists()
    assert (out / "00000.safetensors").read_bytes() != before
    (out / "00001.safetensors").write_bytes(b"mine")
    assert run("--draw", "--shard-size", 3, "--overwrite") == 2
    assert "OUT must hold no other files by the names of its own" in capsys.readouterr().err
    assert (out / "00001.safetensors").read_bytes() == b"mine"


def test_a_renamed_autoencoder_is_the_same(run, vae, tmp_path, capsys):
    assert run() == 0
    shutil.copytree(vae, tmp_path / "renamed")
    capsys.readouterr()
    assert run("--vae", tmp_path / "renamed") == 0
    assert "kept 3 of 3 files" in capsys.readouterr().out
    assert run("--vae", save_tiny_vae(tmp_path / "other", scaling_factor=0.5)) == 2
    assert "which is of others" in capsys.readouterr().err


def test_an_index_of_others_stays(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "latents.json").write_text("mine")
    assert run("--overwrite") == 2
    assert "OUT must hold no other files by the names of its own" in capsys.readouterr().err
    assert (tmp_path / "out" / "latents.json").read_text() == "mine"


def test_other_images_are_other_latents(run, images, tmp_path, capsys):
    assert run() == 0
    PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(images / "dog" / "0.png")
    assert run() == 2
    assert "which is of others" in capsys.readouterr().err
    assert is_latents(tmp_path / "out")  # what is refused is left as it is


def test_training_takes_them_and_sampling_makes_images_again(run, vae, tmp_path):
    assert run() == 0
    config = json.dumps(TINY_DIT | {"num_classes": 2})
    train = ["train", "--task", "generate", "--model", "dit_s_2", "--model-config", config, "--device", "cpu",
             "--data", tmp_path / "out", "--out", tmp_path / "model", "--iterations", 2, "--batch-size", 2]  # fmt: skip
    assert main([*map(str, train)]) == 0
    sample = ["sample", "--model", tmp_path / "model", "--vae", vae, "--device", "cpu", "--steps", 2,
              "--out", tmp_path / "images", "--classes", 0, 1]  # fmt: skip
    assert main([*map(str, sample)]) == 0
    for name in ("0000_000000.png", "0001_000001.png"):
        with PIL.Image.open(tmp_path / "images" / name) as picture:
            assert picture.size == (8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", 7], "--size must be a multiple of 2 for this autoencoder; got 7"),
        (["--size", 0], "--size must be at least 1; got 0"),
        (["--batch-size", 0], "--batch-size must be at least 1; got 0"),
        (["--shard-size", 0], "--shard-size must be at least 1; got 0"),
        (["--seed", -1], "--seed must be at least 0; got -1"),
        (["--vae", "none"], "vae must be a folder of an AutoencoderKL"),
    ],
)
def test_wrong_calls(run, tmp_path, capsys, options, message):
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latents_must_be_finite(run, tmp_path, capsys):
    broken = save_tiny_vae(tmp_path / "broken")
    file = broken / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(file)
    state["quant_conv.bias"][0] = float("inf")
    safetensors.torch.save_file(state, file)
    assert run("--vae", broken) == 2
    assert "--vae must give finite latents in float32; got others, of" in capsys.readouterr().err
    assert not is_latents(tmp_path / "out")


def test_folders_that_do_not_serve(run, images, tmp_path, capsys):
    assert run(out=images) == 2
    assert "OUT must be another folder than IN" in capsys.readouterr().err
    for path in images.rglob("*.png"):
        path.write_bytes(b"nonsense")
    assert run() == 2
    assert "IN must hold an image that can be read; got 5 that cannot" in capsys.readouterr().err
    assert not is_latents(tmp_path / "out")
    assert shard_metadata(tmp_path / "out" / "00000.safetensors") is not None
