"""The commands with a model of several tasks, of which one magnifies."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import ipt_fast
from ipt_fast.cli import main
from ipt_fast.data.resize import imresize
from ipt_fast.evaluation.metrics import psnr
from ipt_fast.evaluation.runner import evaluate
from ipt_fast.models import open_model


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    shape = dict(image_size=12, patch_size=3, features=4, layers=1, heads=3)
    ipt = ipt_fast.create_model("ipt", tasks=("sr_x2", "derain", "denoise50"), **shape)
    ipt.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rows, columns = np.mgrid[:33, :42] / 6
    for i in range(2):
        waves = np.stack([np.sin(rows * (i + 1) + c) * np.cos(columns) for c in range(3)], 2)
        Image.fromarray((127 + 100 * waves).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_super_resolution_is_measured_against_bicubic(model, photos, tmp_path, capsys):
    table = tmp_path / "table.csv"
    options = ["--protocol", "basicsr-y", "--dtype", "float32", "--csv", table]
    assert run("eval", "--model", model, "--task", "sr_x2", "--data", photos, *options) == 0
    (row,) = rows(table)
    assert row["model"] == f"{model} sr_x2" and row["sigma"] == "" and row["images"] == "2"
    # Bicubic by hand: a multiple of the scale, 8 bits between, two pixels of the border left out.
    figures = []
    for path in sorted(photos.iterdir()):
        clean = np.asarray(Image.open(path)).astype(np.float64)[:32, :42] / 255
        channels = torch.from_numpy(clean).permute(2, 0, 1)
        small = (255 * imresize(channels, 0.5).clamp(0, 1)).round() / 255
        large = imresize(small, 2).clamp(0, 1).permute(1, 2, 0).numpy()
        luma = [16 + image @ np.array([65.481, 128.553, 24.966]) for image in (large, clean)]
        figures.append(psnr(luma[0][2:-2, 2:-2], luma[1][2:-2, 2:-2], data_range=255))
    assert abs(float(row["psnr_input"]) - np.mean(figures)) < 2e-4
    assert run("eval", "--model", model, "--task", "sr_x2", "--data", photos, "--sigma", 30) == 2
    assert "--sigma and --target must be left out for a task that magnifies; got sr_x2" in capsys.readouterr().err


def test_perfect_super_resolution(photos):
    clean = {}

    def oracle(image):
        key = image.shape
        return clean[key]

    for path in photos.iterdir():
        pixels = np.asarray(Image.open(path)).astype(np.float64)[:32] / 255
        clean[(16, 21, 3)] = pixels
    found = evaluate(oracle, photos, "rgb", scale=2, limit=2)
    assert found.scores[1].psnr_output == float("inf") and not found.failures
    for scale in (1, 2.0, True):
        with pytest.raises(ValueError, match="scale must be an int of at least 2"):
            evaluate(oracle, photos, scale=scale)


def test_a_denoising_head_takes_noise_it_has_not_seen(model, photos, tmp_path):
    """The paper's test of generality (table 4)."""
    table = tmp_path / "table.csv"
    levels = ("--sigma", 10, 70)
    assert run("eval", "--model", model, "--task", "denoise50", "--data", photos, *levels, "--csv", table) == 0
    assert [row["sigma"] for row in rows(table)] == ["10", "70"]


def test_restoring_larger_images(model, photos, tmp_path, capsys):
    source = photos / "0.png"
    pixels = np.array(Image.open(source))
    Image.fromarray(np.dstack([pixels, np.full_like(pixels[:, :, 0], 77)])).save(source)
    options = ["--model", model, "--task", "sr_x2", "--dtype", "float32"]
    assert run("restore", source, tmp_path / "large.png", *options, "--compare", "--tile", "official") == 0
    large = Image.open(tmp_path / "large.png")
    assert large.size == (84, 66) and large.mode == "RGBA" and set(np.asarray(large)[:, :, 3].flat) == {77}
    assert (tmp_path / "large_compare.png").exists()
    target = tmp_path / "target.png"
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(target)
    assert run("restore", photos / "0.png", tmp_path / "again.png", *options, "--target", target) == 0
    assert "PSNR" in capsys.readouterr().out
    assert run("restore", photos / "0.png", tmp_path / "no.png", *options, "--noise", 25) == 2
    assert "--noise must be left out for a task that magnifies" in capsys.readouterr().err
    assert run("restore", photos / "0.png", tmp_path / "no.png", "--model", model) == 2
    assert "task must be one of sr_x2, derain, denoise50" in capsys.readouterr().err


def test_converting_published_files(model, photos, tmp_path, capsys):
    ipt = open_model(model).only("denoise50")
    torch.save({"params": ipt.state_dict()}, tmp_path / "published.pt")
    convert = ["convert", tmp_path / "published.pt", tmp_path / "new", "--model", "ipt"]
    heads = ["--model-config", '{"heads": 3}']
    for arguments, message in (
        (["--tasks", "denoise50"], "heads must be given for a shape"),  # another shape than ipt's
        (heads, "tasks must be given where tails"),
        ([*heads, "--tasks", "sr_x2"], "tasks must fit"),
        (["--model-config", '{"heads": 5}', "--tasks", "derain"], "heads must divide the 36 channels"),
        (
            ["--model-config", '{"heads": 3, "tasks": ["derain"]}', "--tasks", "derain"],
            "--tasks must be left out where",
        ),
    ):
        assert run(*convert, *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert run(*convert, *heads, "--tasks", "denoise50") == 0
    opened, x = open_model(tmp_path / "new"), 255 * torch.rand(1, 3, 12, 12)
    assert opened.config == ipt.config and torch.equal(opened(x), ipt(x))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_bytes(b"precious")
    for out in ("new", "full", "published.pt"):
        assert run("convert", tmp_path / "published.pt", tmp_path / out, "--model", "ipt", *heads) == 2
        assert "OUT must be a new folder, or an empty one" in capsys.readouterr().err
    for saved in (tmp_path / "new", tmp_path / "new" / "model.safetensors"):
        assert run("convert", saved, tmp_path / "no", "--model", "ipt", *heads, "--tasks", "denoise50") == 2
        assert "which is a saved model already" in capsys.readouterr().err
    restore = ["restore", photos / "0.png", tmp_path / "0.png", "--model", "ipt"]
    assert run(*restore, "--checkpoint", tmp_path / "published.pt") == 2
    assert "with ipt-fast convert" in capsys.readouterr().err


def test_the_name_tells_the_heads_of_its_shape_alone(tmp_path, capsys):
    torch.save(ipt_fast.create_model("ipt_tiny", pretrained=True).state_dict(), tmp_path / "tiny.pt")
    tasks = ["--tasks", "sr_x2", "derain", "denoise30", "denoise50"]
    assert run("convert", tmp_path / "tiny.pt", tmp_path / "wrong", "--model", "ipt", *tasks) == 2
    assert "heads must be given for a shape" in capsys.readouterr().err
    assert run("convert", tmp_path / "tiny.pt", tmp_path / "right", "--model", "ipt_tiny", *tasks) == 0
    assert open_model(tmp_path / "right").config == open_model("ipt_tiny").config


def test_converting_other_models(tmp_path, capsys):
    torch.save(ipt_fast.create_model("ipt_v2_tiny", pretrained=True).state_dict(), tmp_path / "v2.pt")
    convert = ["convert", tmp_path / "v2.pt", tmp_path / "new", "--model"]
    assert run(*convert, "ipt") == 2
    assert "path must hold an IPT; got" in capsys.readouterr().err
    assert run(*convert, "ipt_v2_tiny", "--tasks", "derain") == 2
    assert "; got tasks" in capsys.readouterr().err
    assert run(*convert, "ipt_v2_tiny", "--model-config", '{"merged": true}') == 0
    assert open_model(tmp_path / "new").config.merged


def test_plots(model, photos, tmp_path, capsys):
    for kind in ("positions", "tasks"):
        assert run("plot", kind, tmp_path / f"{kind}.png", "--model", model) == 0
        picture = np.asarray(Image.open(tmp_path / f"{kind}.png").convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    for task in ("sr_x2", "derain", "denoise50"):
        options = ["--model", model, "--task", task, "--image", photos / "1.png"]
        assert run("plot", "restorations", tmp_path / f"{task}.png", *options) == 0
        assert Image.open(tmp_path / f"{task}.png").width > 1400
    assert run("plot", "positions", tmp_path / "no.png") == 2
    assert "model must have position embeddings; got IPTV2" in capsys.readouterr().err
    assert run("plot", "restorations", tmp_path / "no.png", "--model", model) == 2
    assert run("plot", "tasks", tmp_path / "no.jpg", "--model", model) == 2


def test_similarities():
    from ipt_fast.evaluation.embeddings import position_similarity, task_similarity

    ipt = ipt_fast.create_model("ipt", image_size=4, patch_size=2, features=1, heads=1, layers=1, tasks=("derain",))
    with torch.no_grad():
        weight = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [-1, 0, 0, 0]])
        ipt.body.position_encoding.pe.weight.copy_(weight)
        ipt.body.query_embed.weight.copy_(weight.view(1, -1))
    expected = np.array([[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]])
    assert np.allclose(position_similarity(ipt), expected)
    assert np.allclose(task_similarity(ipt)["derain"], expected)
    with pytest.raises(ValueError, match="model must have task embeddings; got IPT"):
        task_similarity(ipt_fast.create_model("ipt_tiny", task_embedding=False))
