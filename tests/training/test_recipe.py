"""Recipes: what their keys mean, what is refused, and that each that ships trains."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ipt_fast.cli import main
from ipt_fast.models import saved_folder
from ipt_fast.training.checkpoint import load_checkpoint
from ipt_fast.training.config import TrainingConfig
from ipt_fast.training.loop import learning_rate, train
from ipt_fast.training.recipe import KEYS, read_recipe, recipe_of, shipped_recipes
from tests.training.conftest import MICRO

RECIPES = shipped_recipes()
TINY = [name for name in RECIPES if name.startswith("ipt_v2_tiny")]  # those of the models that ship
MICRO_GENERATORS = {
    "dit_s_2": {"width": 8, "layers": 1, "heads": 1},
    "latent_ipt_v2_s": {"width": 4, "depths": [1, 1, 1], "heads": [1, 1, 1], "window_size": 4, "grid_size": 4},
}
GENERATORS = [name for name in RECIPES if name in MICRO_GENERATORS]
RESTORMERS = [name for name in RECIPES if name.startswith("restormer_")]
PAPERS = [name for name in RECIPES if name not in TINY + GENERATORS + RESTORMERS]
TASKS = {
    *("gaussian_color_denoising", "gaussian_gray_denoising", "real_denoising", "deraining", "motion_deblurring"),
    *("defocus_deblurring_single", "defocus_deblurring_dual_pixel", "super_resolution_x4", "jpeg_artifact_removal"),
    *(f"gaussian_{kind}_denoising_sigma{sigma}" for kind in ("color", "gray") for sigma in (15, 25, 50)),
}


@pytest.fixture
def write(tmp_path):
    """A recipe from its text."""

    def make(text):
        path = tmp_path / "recipe.yml"
        path.write_text(text)
        return path

    return make


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Tiny images in every place that the recipes name."""
    monkeypatch.setenv("IPT_FAST_DATA", str(tmp_path / "data"))
    waves = np.sin(np.mgrid[:32, :40][0] / 3)[..., None] * 100 + 127
    for path in RECIPES.values():
        for name in re.findall(r"\$\{IPT_FAST_DATA\}/(\S+)", path.read_text()):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.repeat(waves, 3, 2).astype(np.uint8)).save(tmp_path / "data" / name / "a.png")
    return tmp_path / "data"


def test_a_recipe_of_every_task_ships():
    assert set(RECIPES) >= TASKS
    assert len(RESTORMERS) == 7 and {name.removeprefix("restormer_") for name in RESTORMERS} < TASKS


@pytest.mark.parametrize("name", PAPERS)
def test_the_recipe_of_the_paper(name, monkeypatch):
    """IPT-V2, section 4: stages from iterations 0, 116k, 176k, 224k and 270k of 300k; Restormer's clipping and loss."""
    monkeypatch.setenv("IPT_FAST_DATA", "/photos")
    config = TrainingConfig(**read_recipe(name))
    starts = np.cumsum((0, *config.iterations))
    assert starts.tolist() == [0, 116_000, 176_000, 224_000, 270_000, 300_000]
    scale = 4 if "super" in name else 1
    assert config.patch_size == tuple(side // scale for side in (128, 192, 256, 320, 384))
    assert config.batch_size == (64, 32, 16, 8, 8)
    assert (config.lr, config.lr_min, config.schedule, config.warmup) == (3e-4, 1e-6, "cosine", 0)
    assert (config.betas, config.weight_decay, config.grad_clip) == ((0.9, 0.999), 1e-4, 0.01)
    assert (config.loss, config.ema, config.amp) == ("l1", 0.999, "none")
    assert config.model == "ipt_v2_base" and config.out.name == name
    assert all(str(path).startswith("/photos/") for folders, _, _ in config.sources for path in folders)


@pytest.mark.parametrize("name", RESTORMERS)
def test_the_recipe_of_restormer(name, monkeypatch):
    """Its section 4: stages from iterations 0, 92k, 156k, 204k, 240k and 276k of 300k; the data of IPT-V2's recipe."""
    monkeypatch.setenv("IPT_FAST_DATA", "/photos")
    config = TrainingConfig(**read_recipe(name))
    starts = np.cumsum((0, *config.iterations))
    assert starts.tolist() == [0, 92_000, 156_000, 204_000, 240_000, 276_000, 300_000]
    assert config.patch_size == (128, 160, 192, 256, 320, 384) and config.batch_size == (64, 40, 32, 16, 8, 8)
    assert (config.lr, config.lr_min, config.schedule, config.warmup) == (3e-4, 1e-6, "cosine", 0)
    assert (config.betas, config.weight_decay, config.grad_clip) == ((0.9, 0.999), 1e-4, 0.01)
    assert (config.loss, config.ema, config.amp, config.out.name) == ("l1", 0, "none", name)
    model = "denoising" if "denoising" in name else "dual_pixel" if "dual_pixel" in name else None
    assert config.model == (f"restormer_{model}" if model else "restormer")
    assert config.model_config == ({"in_channels": 1, "out_channels": 1} if "gray" in name else {})
    same = TrainingConfig(**read_recipe(name.removeprefix("restormer_")))
    assert (config.sources, config.task, config.sigma) == (same.sources, same.task, same.sigma)
    assert (config.val, config.val_target, config.val_sigma) == (same.val, same.val_target, same.val_sigma)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_recipe_of_a_generator(name, monkeypatch):
    """IPT-V2, section 4.4: AdamW, 1e-4 throughout, batches of 256, mirrored images; averages and clipping are DiT's."""
    monkeypatch.setenv("IPT_FAST_DATA", "/latents")
    config = TrainingConfig(**read_recipe(name))
    assert (config.model, config.model_config, config.task, config.flip) == (name, {}, "generate", True)
    assert {learning_rate(config, iteration) for iteration in (0, 1, 400_000, 799_999)} == {1e-4}
    assert (config.total_iterations, config.batch_size, config.ema) == (800_000, (256,), 0.9999)
    assert (config.betas, config.weight_decay, config.grad_clip) == ((0.9, 0.999), 0, 0)


def test_what_the_recipes_train(monkeypatch):
    monkeypatch.setenv("IPT_FAST_DATA", "/photos")
    settings = {name: TrainingConfig(**read_recipe(name)) for name in RECIPES}
    for kind, shape in (("color", {}), ("gray", {"in_channels": 1, "out_channels": 1})):
        assert settings[f"gaussian_{kind}_denoising"].sigma == (0, 50)
        for sigma in (15, 25, 50):
            config = settings[f"gaussian_{kind}_denoising_sigma{sigma}"]
            assert (config.sigma, config.val_sigma, config.task) == ((sigma, sigma), sigma, "denoise")
            assert config.model_config == shape and config.target is None
    for name in ("real_denoising", "deraining", "motion_deblurring", "defocus_deblurring_single"):
        assert settings[name].target.name == "target" and settings[name].data.name == "input"
    dual = settings["defocus_deblurring_dual_pixel"]
    assert [path.name for path in dual.data] == [path.name for path in dual.val] == ["inputL", "inputR"]
    assert dual.model_config == {"in_channels": 6, "out_channels": 3}
    assert settings["super_resolution_x4"].task == "sr_x4" and settings["jpeg_artifact_removal"].task == "jpeg"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name, photos, tmp_path):
    """Its model made tiny, its patches small, two iterations of two stages."""
    settings = read_recipe(name)
    shape = settings.get("model_config", {})
    small = {"iterations": (1, 1), "patch_size": (8, 8), "batch_size": (2, 1), "workers": 0, "save_every": 2}
    if name in RESTORMERS:
        shape = {"width": 4, "depths": (1, 1, 1, 1), "refinement": 0, **shape}
    else:
        shape = {**MICRO, "width": 4, **shape}
    if name in GENERATORS:
        del small["patch_size"]
        shape = {**MICRO_GENERATORS[name], "in_channels": 3, "sample_size": 16}
    started = "ipt_v2_tiny" if name in TINY else settings["model"]  # those that ship start from one another
    made = {"out": tmp_path / "run", "model": started, "model_config": shape, "device": "cpu"}
    config = TrainingConfig(**{**settings, **small, **made})
    assert train(config) == 2
    saved = load_checkpoint(config.out / "checkpoint.pth")["config"]
    assert saved["betas"] == (0.9, 0.999) and saved["grad_clip"] == settings["grad_clip"]  # what was resolved


def test_recipes_of_the_models_that_ship_start_from_the_weights_that_ship(monkeypatch):
    monkeypatch.setenv("IPT_FAST_DATA", "/photos")
    started = {name: TrainingConfig(**read_recipe(name)) for name in TINY}
    assert started.pop("ipt_v2_tiny").model == "ipt_v2_tiny"
    assert {config.model for config in started.values()} == {str(saved_folder("ipt_v2_tiny"))}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_tells_its_recipe(name, monkeypatch, write):
    monkeypatch.setenv("IPT_FAST_DATA", "/photos")
    config = TrainingConfig(**read_recipe(name))
    again = TrainingConfig(**read_recipe(write(recipe_of(config))), out=config.out)
    assert again.to_dict() == config.to_dict()


def test_any_run_tells_its_recipe(write):
    for settings in (
        {"data": "a"},
        {"data": ("a", "b", "c"), "target": ("t", None, "u"), "shrink": (1, 2, 1), "data_weights": (1, 2, 3)},
        {"data": ("c", "l", "r"), "target": (None, "t"), "val": ("vl", "vr"), "val_target": "vt", "amp": "bf16"},
        {"data": "a", "model": "runs/a", "task": {"denoise": 2.0, "jpeg": 1.0}, "schedule": "step", "sigma": (1, 55)},
        {"data": "a", "task": "sr_x2", "patch_size": (8, 16), "iterations": (1, 2), "batch_size": (3, 4), "lr": 1e-05},
        {"data": "a", "grad_clip": 0.0, "warmup": 0, "workers": 3, "val": "v", "val_sigma": 15.0, "loss": "l1"},
    ):
        config = TrainingConfig(out="out", **settings)
        assert TrainingConfig(**read_recipe(write(recipe_of(config))), out="out").to_dict() == config.to_dict()


def test_every_setting_has_a_key():
    """So that a recipe can say all that a command line can."""
    joined = {"data", "target", "val", "val_target", "patch_size", "model_config"}
    named = {field for field, _ in KEYS.values()} | joined
    assert {entry.name for entry in dataclasses.fields(TrainingConfig)} <= named
    assert named - {""} <= {entry.name for entry in dataclasses.fields(TrainingConfig)}


def test_values_as_people_write_them(write, monkeypatch):
    monkeypatch.setenv("PHOTOS", "/photos")
    path = write("""
        name: mine
        datasets:
          train:
            task: {denoise: 2, camera: 1}
            dataroot_gt: [$PHOTOS/a, b, c]
            dataroot_lq: [~, ~, noisy]
            shrink: [2, 1, 1]
            weights: [1, 1, 2]
            gt_sizes: 96
            batch_sizes: 4
        network_g: {type: ipt_v2_tiny, width: 24, depths: [2, 2, 2, 2]}
        train:
          total_iter: 500
          use_grad_clip: 0.5
          optim_g: {lr: 1e-3, betas: [0.9, 0.99]}
          pixel_opt: {type: CharbonnierLoss}
    """)
    config = TrainingConfig(**read_recipe(path))
    assert config.task == {"denoise": 2, "camera": 1} and config.lr == 1e-3 and config.grad_clip == 0.5
    assert [(str(folders[0]), target and str(target), times) for folders, target, times in config.sources] == [
        ("/photos/a", None, 2), ("b", None, 1), ("noisy", "c", 1),
    ]  # fmt: skip
    assert config.iterations == (500,) and config.patch_size == (96,) and config.data_weights == (1, 1, 2)
    assert config.model_config == {"width": 24, "depths": [2, 2, 2, 2]} and config.loss == "charbonnier"


def test_the_recipe_of_the_page_on_training(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    config = TrainingConfig(**read_recipe(write(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])))
    assert len(config.sources) == 3 and config.sources[1] == ((Path("/home/me/raw"),), None, 2)
    assert all(f"`{name}`" in page or re.search(r"_sigma\d+$", name) for name in RECIPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {total_iter: 5}", "trian is no known key; the nearest one is train$"),
        (
            "train: {optim_g: {learning_rate: 1}}",
            "train.optim_g.learning_rate is no known key; the nearest one is train.o",
        ),
        (
            "datasets: {train: {gt_size: 128}}",
            "datasets.train.gt_size is no known key; the nearest .* datasets.train.gt_sizes",
        ),
        ("train: {lr: 1, lr: 2}", "keys must be there once; got lr twice"),
        ("train: 3", "train must be a mapping; got 3"),
        ("- a", "the file must be a mapping"),
        ("train: {", "while parsing"),
        ("network_g: {type: resnet}", "network_g.type must be one of .*ipt, .*; got 'resnet'"),
        (
            "train: {pixel_opt: {type: MSELoss}}",
            "train.pixel_opt.type must be one of L1Loss, CharbonnierLoss; got 'MSELoss'",
        ),
        ("train: {optim_g: {type: SGD}}", "train.optim_g.type must be one of AdamW; got 'SGD'"),
        (
            "datasets: {train: {iters: [5, 5]}}\ntrain: {total_iter: 11}",
            r"train.total_iter must be the sum .*\[5, 5\]; got 11",
        ),
        ("scale: 4\ndatasets: {train: {gt_sizes: [66]}}", r"gt_sizes must be multiples of scale = 4; got \[66\]"),
        ("datasets: {train: {dataroot_lqL: a, dataroot_gt: b}}", "dataroot_lqL must come with dataroot_lqR"),
        ("datasets: {train: {dataroot_lq: [a, b], dataroot_gt: c}}", "dataroot_gt must be one folder for each input"),
        ("datasets: {train: {dataroot_gt: '${NO_SUCH_PLACE}/a'}}", "data must be a path whose variables are set; got "),
        ("network_g: {width: 8}\npath: {pretrain_network_g: a}", "network_g must be left out where path.pretrain"),
        ("name: 3", "name must be a text; got 3"),
        ("datasets: {train: {gt_sizes: 64}}\nscale: two", "scale must be an integer of at least 1; got 'two'"),
        ("datasets: {train: {gt_sizes: 64}}\nscale: 0", "scale must be an integer of at least 1; got 0"),
        ("datasets: {train: {gt_sizes: true}}", r"gt_sizes must be multiples of scale = 1; got \[True\]"),
        ("train: {scheduler: {type: [step]}}", r"train.scheduler.type must be one of .*; got \['step'\]"),
        ("path: {pretrain_network_g: [a]}", r"pretrain_network_g must be a folder or a model that ships; got \['a'\]"),
        (
            "datasets: {train: {dataroot_lqL: a, dataroot_lqR: [a, b], dataroot_gt: c}}",
            "dataroot_lqR must be one for each dataroot_lqL; got 2 for 1",
        ),
    ],
)
def test_what_is_refused(write, text, message):
    path = write(text)
    with pytest.raises(ValueError, match=f"config must be a recipe; got {re.escape(str(path))}, in which .*{message}"):
        read_recipe(path)


def test_what_is_set_beside_the_folders_leaves_them(write):
    path = write(
        "datasets: {train: {dataroot_gt: [a, b], shrink: [1, 2], weights: [2, 1]},"
        " val: {dataroot_gt: c, sigma_test: 5}}"
    )
    fields = read_recipe(path, {"shrink", "val_sigma"})
    assert {*fields} == {"data", "data_weights", "val"}
    assert {*read_recipe(path, {"data"})} == {"val", "val_sigma"}
    assert {*read_recipe(path, {"val"})} == {"data", "shrink", "data_weights"}


def test_a_mapping_may_be_put_into_another(write):
    path = write("train: {optim_g: &first {lr: 1e-3, weight_decay: 0.0}}\npath: {}\n")
    assert read_recipe(path) == {"lr": 1e-3, "weight_decay": 0.0}
    path = write("datasets: {val: &photos {dataroot_gt: a}, train: {<<: *photos, enlarge: 2}}")
    fields = read_recipe(path)
    assert fields["data"] == fields["val"] == [Path("a")] and fields["enlarge"] == 2


def test_unknown_recipes_are_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="config must be a YAML file or one of camera_denoising, .*; got derain"):
        read_recipe("derain")


def test_options_win_over_the_file(photos, images, tmp_path, monkeypatch, capsys):
    shape = '{"width": 4, "depths": [2, 0, 0, 0], "window_size": 8, "grid_size": 4}'
    short = ["--iterations", "2", "--patch", "8", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    arguments = ["train", "--config", "deraining", *short, "--model-config", shape]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0  # into the folder of its name
    assert main([*arguments, "--out", "other", "--data", str(images), "--task", "derain", "--lr", "1e-3"]) == 0
    found = [load_checkpoint(tmp_path / out / "checkpoint.pth")["config"] for out in ("experiments/deraining", "other")]
    assert found[0]["target"] and found[1]["target"] is None  # of pairs, which belong together
    assert [each["lr"] for each in found] == [3e-4, 1e-3] and [each["grad_clip"] for each in found] == [0.01, 0.01]
    monkeypatch.delenv("IPT_FAST_DATA")
    capsys.readouterr()
    assert main([*arguments, "--out", "third"]) == 2
    assert "${IPT_FAST_DATA} is not" in capsys.readouterr().err and not (tmp_path / "third").exists()
    again = ["train", "--config", str(tmp_path / "other" / "recipe.yml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0  # a run writes its settings down
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("other", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yml").write_text("train: {ema_decay: 0.9}")
    assert main([*again[:-1], str(tmp_path / "mine")]) == 2
    assert "recipe.yml in --out must be a new file, or one that this command made" in capsys.readouterr().err
    path = tmp_path / "more.yml"
    path.write_text(yaml.safe_dump({"train": {"optim_g": {"lr": 0.002}}}))
    assert main(["train", "--out", "other", "--resume", "--config", str(path)]) == 2
    assert "lr must be 0.001, as in the run to resume; got 0.002" in capsys.readouterr().err
    path.write_text(yaml.safe_dump({"train": {"optim_g": {"lr": 0.001}}}))
    assert main(["train", "--out", "other", "--resume", "--config", str(path)]) == 0


def test_fine_tuning_by_a_recipe(images, tmp_path, capsys):
    path = tmp_path / "tune.yml"
    path.write_text(f"datasets: {{train: {{task: derain, dataroot_gt: {images}, iters: 1, batch_sizes: 1}}}}")
    out = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["finetune", "--config", str(path), *out]) == 2  # no model
    path.write_text(path.read_text() + f"\npath: {{pretrain_network_g: {tmp_path}/saved}}")
    from ipt_fast.models import create_model
    from tests.training.test_pretraining import TINY

    create_model("ipt", **TINY).save_pretrained(tmp_path / "saved")
    assert main(["finetune", "--config", str(path), *out]) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["config"]["lr"] == 2e-5  # fine-tuning's own
