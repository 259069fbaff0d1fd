"""``ipt-fast sample``: which images it draws, that they depend on nothing else, its files, and what it refuses."""

import json
import os

import numpy as np
import PIL.Image
import pytest
import torch

from ipt_fast.cli import main
from ipt_fast.cli import sample as command
from ipt_fast.data.npz import NpzImages
from ipt_fast.diffusion import sample
from ipt_fast.diffusion.vae import open_vae
from ipt_fast.models import open_model
from tests.cli.generators import save_generator
from tests.diffusion.tiny_vae import save_tiny_vae


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A model of RGB pixels."""
    return save_generator(tmp_path_factory.mktemp("pixels"), in_channels=3)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return save_generator(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def run(pixels):
    def call(*options, model=pixels):
        arguments = ["--model", model, "--device", "cpu", "--steps", 3, "--dtype", "float32", *options]
        return main(["sample", *map(str, arguments)])

    return call


def read(path):
    return np.asarray(PIL.Image.open(path))


def names(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def expected(model, label, seed, **options):
    values = sample(open_model(model), [label], seeds=[seed], steps=3, clip=True, **options)[0]
    return ((values + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def test_each_class_with_each_seed(run, pixels, tmp_path):
    assert run("--classes", 2, 0, "--seeds", 7, 5, "--out", tmp_path, "--backend", "reference") == 0
    assert names(tmp_path) == ["0000_000005.png", "0000_000007.png", "0002_000005.png", "0002_000007.png"]
    for label, seed in ((0, 5), (2, 7)):
        assert np.array_equal(read(tmp_path / f"{label:04d}_{seed:06d}.png"), expected(pixels, label, seed))


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ([], [f"{n % 3:04d}_{n:06d}.png" for n in range(8)]),
        (["--classes", 1, 3], ["0001_000000.png", "0003_000001.png"]),
        (["--count", 5, "--classes", 2, 0], [f"{(2, 0)[n % 2]:04d}_{n:06d}.png" for n in range(5)]),
        (["--seeds", 9], [f"{n:04d}_000009.png" for n in range(3)]),
    ],
)
def test_which_images(run, tmp_path, options, drawn):
    assert run("--out", tmp_path, *options, "--steps", 2) == 0
    assert names(tmp_path) == sorted(drawn)


def test_options_reach_the_sampler(run, pixels, tmp_path):
    options = {"guidance": 3.0, "sampler": "ddim", "eta": 0.5}
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    assert run("--classes", 1, "--seeds", 4, "--out", tmp_path, "--backend", "reference", *arguments) == 0
    assert np.array_equal(read(tmp_path / "0001_000004.png"), expected(pixels, 1, 4, **options))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_same_seed_gives_the_same_bits_whatever_else_is_drawn(run, tmp_path, batch_size):
    alone, among = tmp_path / "alone", tmp_path / "among"
    options = ("--batch-size", batch_size, "--guidance", 2, "--classes")
    assert run(*options, 1, "--seeds", 6, "--out", alone) == 0
    assert run(*options, 1, 2, "--seeds", 6, 3, 4, "--out", among) == 0
    assert (alone / "0001_000006.png").read_bytes() == (among / "0001_000006.png").read_bytes()


def test_a_model_of_latents(run, latents, tmp_path):
    folder = save_tiny_vae(tmp_path / "vae")
    options = ("--classes", 1, "--seeds", 4, "--backend", "reference")
    assert run(*options, "--out", tmp_path / "out", "--vae", folder, model=latents) == 0
    values = open_vae(folder).decode(sample(open_model(latents), [1], seeds=[4], steps=3))[0]
    found = read(tmp_path / "out" / "0001_000004.png")
    assert found.shape == (8, 8, 3)
    assert np.array_equal(found, ((values + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def test_latent_ipt_v2_of_another_size(run, tmp_path):
    small = {"width": 4, "depths": (1, 1, 1), "heads": (1, 1, 1), "window_size": 2, "grid_size": 2, "in_channels": 1}
    model = save_generator(tmp_path / "model", "latent_ipt_v2_s", **small, sample_size=8, num_classes=2)
    options = ("--classes", 1, "--seeds", 4, "--size", 12, "--backend", "reference")
    assert run(*options, "--out", tmp_path / "out", model=model) == 0
    assert np.array_equal(
        read(tmp_path / "out" / "0001_000004.png")[..., None], expected(model, 1, 4, shape=(1, 12, 12))
    )


def test_gray_and_without_classes(run, tmp_path):
    model = save_generator(tmp_path / "model", in_channels=1, num_classes=0)
    out, npz = tmp_path / "out", tmp_path / "o.npz"
    assert run("--out", out, "--npz", npz, "--grid", tmp_path / "g.png", "--count", 2, model=model) == 0
    assert names(out) == ["000000.png", "000001.png"] and PIL.Image.open(out / "000000.png").mode == "L"
    with np.load(npz) as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].shape == (2, 4, 4, 3)
        assert np.array_equal(arrays["arr_0"][1, ..., 2], read(out / "000001.png"))


def test_the_file_for_evaluators_and_the_grid(run, tmp_path):
    out, npz, grid = tmp_path / "out", tmp_path / "o.npz", tmp_path / "g.png"
    classes = ("--classes", 0, 2, "--seeds", 0, 1, 2)
    assert run("--npz", npz, "--grid", grid, *classes) == 0
    assert run("--out", out, *classes) == 0
    with np.load(npz) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and labels.tolist() == [0, 0, 0, 2, 2, 2]
    for image, path in zip(images, names(out), strict=True):
        assert np.array_equal(image, read(out / path))
    assert np.array_equal(images, np.stack([*NpzImages(npz)]))
    picture = read(grid)
    assert picture.shape == (2 + 2 * 6, 2 + 3 * 6, 3)
    assert np.array_equal(picture[2 + 6 : 6 + 6, 2 + 12 : 6 + 12], images[5])


def test_a_stopped_run_goes_on(run, tmp_path, capsys, monkeypatch):
    out, whole, npz = tmp_path / "out", tmp_path / "whole", tmp_path / "o.npz"
    assert run("--out", whole, "--count", 5, "--batch-size", 2) == 0
    write = command._Folder.write

    def stop(folder, image, pixels):
        if image.seed == 3:
            raise KeyboardInterrupt
        write(folder, image, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(command._Folder, "write", stop)
        assert run("--out", out, "--count", 5, "--batch-size", 2, "--npz", npz) == 130
    assert len(names(out)) == 3 and not npz.exists()
    kept = out / "0002_000002.png"
    inode = kept.stat().st_ino
    capsys.readouterr()
    assert run("--out", out, "--count", 5, "--batch-size", 2, "--npz", npz) == 0
    assert "kept 3 of 5, which an earlier run drew\ndrew 2 images" in capsys.readouterr().out
    assert kept.stat().st_ino == inode
    assert names(out) == names(whole)
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names(out))
    with np.load(npz) as arrays:
        # names are sorted by class, the images are in the order of their seeds
        in_order = sorted(names(whole), key=lambda name: name[5:])
        assert np.array_equal(arrays["arr_0"], np.stack([read(whole / name) for name in in_order]))


def test_what_is_not_known_is_not_replaced(run, tmp_path, capsys):
    assert run("--out", tmp_path, "--classes", 1) == 0
    before = read(tmp_path / "0001_000000.png")
    assert run("--out", tmp_path, "--classes", 1, "--guidance", 2) == 2
    assert "not known to be made by this model with these options" in capsys.readouterr().err
    assert run("--out", tmp_path, "--classes", 1, "--guidance", 2, "--overwrite") == 0
    assert not np.array_equal(read(tmp_path / "0001_000000.png"), before)
    for name in ("o.npz", "g.png"):
        (tmp_path / name).write_text("mine")
        assert run("--" + {"o": "npz", "g": "grid"}[name[0]], tmp_path / name) == 2
        assert "must be a new file, or one that this command made" in capsys.readouterr().err
        (tmp_path / name).unlink()
        for _ in range(2):
            assert run("--" + {"o": "npz", "g": "grid"}[name[0]], tmp_path / name, "--count", 1) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "g.txt"], "--grid must be a .png file; got g.txt"),
        (["--npz", "g.png"], "--npz must be a .npz file; got g.png"),
        (["--out", "o", "--classes", 4], "--classes must be from 0 to 3 (3 is no class); got 4"),
        (["--out", "o", "--classes", 1, 1], "--classes must be different numbers; got 1 twice"),
        (["--out", "o", "--seeds", -1], "--seeds must be in [0, 2**63); got -1"),
        (["--out", "o", "--count", 2, "--seeds", 1], "--count must be at least 1, and without --seeds; got 2"),
        (["--out", "o", "--count", 0], "--count must be at least 1, and without --seeds; got 0"),
        (["--out", "o", "--batch-size", 0], "--batch-size must be at least 1; got 0"),
        (["--out", "o", "--size", 0], "--size must be a positive multiple of 1; got 0"),
        (["--out", "o", "--steps", 0], "steps must be"),
        (["--out", "o", "--vae", "none"], "vae must be a folder of an AutoencoderKL"),
        (["--grid", "g.png", "--count", 1025], "--grid must be of at most 1024 images; got 1025"),
        ([], "--out, --grid or --npz must say where the images go; got none"),
    ],
)
def test_wrong_calls(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_models_and_autoencoders_that_do_not_fit(run, latents, tmp_path, capsys):
    assert run("--out", tmp_path, model=latents) == 2
    assert "--vae must be an autoencoder for a model of 4 channels, of latents; got none" in capsys.readouterr().err
    folder = save_tiny_vae(tmp_path / "vae", latent_channels=2)
    assert run("--out", tmp_path, "--vae", folder, model=latents) == 2
    assert "vae must have latents of 4 channels, as the model takes; got one of 2" in capsys.readouterr().err
    assert run("--out", tmp_path, model="ipt_v2_tiny") == 2
    assert "--model must generate images; got ipt_v2_tiny, which restores them" in capsys.readouterr().err


def test_what_is_not_finite_is_named(run, tmp_path, capsys):
    model = open_model(save_generator(tmp_path / "model", in_channels=3))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    assert run("--out", tmp_path / "out", "--classes", 1, model=tmp_path / "model") == 2
    assert (
        "--model must draw finite values; got NaN or infinity for class 1, seed 0 in torch.float32"
        in capsys.readouterr().err
    )
    assert names(tmp_path / "out") == []


def test_the_record_tells_what_an_image_is_made_of(run, tmp_path):
    assert run("--out", tmp_path, "--classes", 2, "--seeds", 3) == 0
    lines = (tmp_path / ".ipt_fast_results.jsonl").read_text().split("\n")
    (record,) = [json.loads(line) for line in lines if line]
    made_from = record["made_from"]
    assert (made_from["class"], made_from["seed"], made_from["vae"]) == (2, 3, None)
    assert made_from["options"]["steps"] == 3
