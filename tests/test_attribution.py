"""Local attribution maps: the integral, the detector, the index, and the command."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipt_fast
from ipt_fast.attribution import blurred, diffusion_index, gini, gradient_magnitude, local_attribution_map
from ipt_fast.cli import main
from ipt_fast.evaluation.attributions import draw_attributions
from tests.models.micro import micro_model


class Linear(nn.Module):
    """A convolution of 5 x 5 pixels."""

    def __init__(self, symmetric=False):
        super().__init__()
        kernel = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(3))
        if symmetric:
            kernel = kernel + kernel.flip(2)
            kernel = kernel + kernel.flip(3)
            kernel = kernel + kernel.transpose(2, 3)
        self.weight = nn.Parameter(kernel / 8)

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=2)


class Curved(nn.Module):
    def forward(self, x):
        return x.mul(3).sin()


class Double(nn.Module):
    """Enlarges twice."""

    def scale(self, task):
        return 2

    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def photo(height=24, width=20, channels=3):
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(5))


WINDOW = (6, 9, 5)


# -- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7])
def test_shares_sum_to_the_change_of_a_linear_detector(steps):
    weights = photo(5, 5)
    found = local_attribution_map(Linear(), photo(), WINDOW, steps=steps, detector=lambda part: (part * weights).sum())
    assert abs(found.change) > 0.1
    assert found.values.sum().item() == pytest.approx(found.change, rel=1e-4)


def test_a_linear_model_s_map_is_its_gradient_times_the_change_of_the_image():
    model, image, weights = Linear(), photo(), photo(5, 5)
    found = local_attribution_map(model, image, WINDOW, steps=4, detector=lambda part: (part * weights).sum())
    left, top, side = WINDOW
    part = torch.zeros(3, 24, 20)
    part[:, top : top + side, left : left + side] = weights
    gradient = F.conv_transpose2d(part[None], model.weight, padding=2)[0]
    torch.testing.assert_close(found.values, gradient * (image - blurred(image, 1.2)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", [Linear(), Curved(), micro_model()], ids=["linear", "curved", "ipt_v2"])
def test_shares_sum_to_the_change_of_the_gradient(model):
    found = local_attribution_map(model, photo(), WINDOW)
    assert abs(found.change) > 0.1
    assert found.values.sum().item() == pytest.approx(found.change, rel=0.01)


def test_nothing_outside_of_the_receptive_field():
    found = local_attribution_map(Linear(), photo(), WINDOW)
    left, top, side = WINDOW
    field = torch.zeros(24, 20, dtype=torch.bool)
    field[top - 2 : top + side + 2, left - 2 : left + side + 2] = True
    assert not found.magnitude[~field].any() and (found.magnitude[field] > 0).all()
    assert found.magnitude.shape == (24, 20) and found.window == WINDOW


def test_windows_at_the_borders_and_of_an_enlarged_output():
    found = local_attribution_map(Double(), photo(), (2 * 20 - 6, 2 * 24 - 6, 6))
    assert found.output.shape == (3, 48, 40)
    assert not found.magnitude[:-3].any() and not found.magnitude[:, :-3].any() and found.magnitude[-3:, -3:].all()
    assert local_attribution_map(Linear(), photo(), (0, 0, 20)).values.any()


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2)])
def test_a_mirrored_image_has_the_mirrored_map(axes):
    model, image = Linear(symmetric=True), photo(24, 24)
    left, top, side = WINDOW
    mirrored = (24 - side - left if 2 in axes else left, 24 - side - top if 1 in axes else top, side)
    found = local_attribution_map(model, image, WINDOW, steps=5)
    other = local_attribution_map(model, image.flip(axes), mirrored, steps=5)
    torch.testing.assert_close(other.values.flip(axes), found.values, rtol=1e-3, atol=1e-5)
    turned = local_attribution_map(model, image.transpose(1, 2), (top, left, side), steps=5)
    torch.testing.assert_close(turned.values.transpose(1, 2), found.values, rtol=1e-3, atol=1e-5)


def test_a_model_is_left_as_it_is_and_runs_whatever_its_form():
    model = micro_model().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = local_attribution_map(model, photo(), WINDOW, steps=2)
    assert (
        model.training
        and not model.config.merged
        and all(p.requires_grad and p.grad is None for p in model.parameters())
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for same in (ipt_fast.freeze(model), model.to_reference()):
        other = local_attribution_map(same, photo(), WINDOW, steps=2)
        assert (other.values - found.values).abs().max() <= 1e-3 * found.values.abs().max()
    torch.testing.assert_close(found.output, model(photo()[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(mode):
    model, image = micro_model(), photo()
    expected = local_attribution_map(model, image, (4, 4, 8), steps=2)
    with mode():
        found = local_attribution_map(model, image.clone(), (4, 4, 8), steps=2)
    assert torch.equal(found.values, expected.values)


def test_a_task_of_a_model_with_several():
    config = {"tasks": ("denoise30", "sr_x2"), "features": 4, "layers": 1, "heads": 3, "image_size": 12}
    model = ipt_fast.create_model("ipt_tiny", **config)
    found = local_attribution_map(model, photo(12, 12), (2, 2, 16), task="sr_x2", steps=2)
    assert found.output.shape == (3, 24, 24) and found.values.isfinite().all()
    with pytest.raises(ValueError, match="image must have the model's 12 x 12 pixels; got"):
        local_attribution_map(model, photo(), WINDOW, task="denoise30")


# -- the parts --------------------------------------------------------------------------------------------------------


def test_the_detector_measures_slopes():
    row, column = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    slope = (3 * row + 4 * column)[None]
    assert gradient_magnitude(slope).item() == pytest.approx(5 * 5 * 6)
    flat = torch.ones(2, 4, 4, requires_grad=True)
    gradient_magnitude(flat).backward()
    assert not flat.grad.any()


def test_blur():
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    spread = blurred(point, 2.0)[0].double()
    place = torch.arange(-20, 21).double()
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * place**2).sum().item() == pytest.approx(4, rel=0.01)
    assert torch.equal(spread, spread.T) and torch.equal(blurred(point, 0), point)
    torch.testing.assert_close(blurred(torch.full((3, 2, 5), 0.3), 9.0), torch.full((3, 2, 5), 0.3))


def test_known_indices():
    one = torch.zeros(5, 8)
    one[2, 3] = 7
    assert diffusion_index(one) == pytest.approx(100 / 40) and gini(one) == pytest.approx(39 / 40)
    assert diffusion_index(torch.full((5, 8), 0.3)) == pytest.approx(100)
    half = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert gini(half) == pytest.approx(0.5)
    values = photo().flatten()[:50]
    differences = (values[:, None] - values).abs().sum() / (2 * 50**2 * values.mean())
    assert gini(values) == pytest.approx(differences.item(), rel=1e-5) == gini(9 * values.flip(0))


@pytest.mark.parametrize(
    "values", [torch.zeros(4), torch.tensor([-1.0, 2]), torch.tensor([]), torch.tensor([1.0, torch.inf])]
)
def test_what_has_no_index(values):
    with pytest.raises(ValueError, match="values must be finite and at least 0"):
        gini(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "ipt_v2_tiny"}, "model must be a torch.nn.Module; got str"),
        ({"image": photo().numpy()}, "image must be a tensor of floats"),
        ({"image": photo()[None]}, r"image must be \(C, H, W\); got \(1, 3, 24, 20\)"),
        ({"image": torch.full((3, 9, 9), 0.5)}, "image must not be flat"),
        ({"image": photo().log() / 0}, "image must be finite"),
        ({"window": (16, 0, 5)}, "window must .* 20 x 24 pixels; got left 16, top 0, side 5"),
        ({"window": (0, -1, 5)}, "window must"),
        ({"window": (0, 0, 1)}, "window must have a side of at least 2"),
        ({"window": (0, 0)}, "window must be three ints"),
        ({"window": (0, 0.0, 4)}, "window must be three ints"),
        ({"sigma": 0}, "sigma must be a positive number"),
        ({"sigma": float("inf")}, "sigma must be a positive number"),
        ({"sigma": 25}, "at most the longer side of the image"),
        ({"detector": lambda part: part}, "detector must make a tensor of one number"),
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"task": "derain"}, "task must be None for Linear"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"model": Linear(), "image": photo(), "window": WINDOW, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        local_attribution_map(arguments.pop("model"), arguments.pop("image"), arguments.pop("window"), **arguments)


def test_a_window_where_nothing_happens():
    image = torch.zeros(3, 40, 40)
    image[:, :4, :4] = photo(4, 4)
    with pytest.raises(ValueError, match="window must be one whose output changes with the image"):
        local_attribution_map(Linear(), image, (30, 30, 6))


# -- the command ------------------------------------------------------------------------------------------------------


def test_picture():
    found = local_attribution_map(Double(), photo(), (8, 8, 12), steps=2)
    row = ("twice", found.output, found.magnitude, found.window, found.diffusion_index)
    picture = np.asarray(draw_attributions(photo(), [row, row]))
    assert picture.shape == (16 + 2 * (384 + 28 + 16), 16 + 3 * 336, 3)
    x, y = 16 + 8 * 8, 16 + 28 + 8 * 8  # an output of 40 pixels is 320 wide
    assert (picture[y, x] == (255, 214, 10)).all() and (picture[y, x + 336] == 255).all()
    heat = picture[16 + 28 :][:384, 16 + 336 :][:, :320].astype(int)
    assert (heat[-20:] == heat[-1, -1]).all() and heat[150, 100].sum() > heat[-1, -1].sum()
    with pytest.raises(ValueError, match="maps must hold at least one"):
        draw_attributions(photo(), [])


def test_command(tmp_path, capsys):
    for order in ("focal", "grid"):
        micro_model(depths=(2, 0, 0, 0), order=order).save_pretrained(tmp_path / order)
    pixels = (photo(channels=1)[0] * 255).byte().numpy()
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    arguments = ["attribute", str(tmp_path / "photo.png"), "--window", "4", "6", "8", "--steps", "3", "--noise", "20"]
    arguments += ["--model", str(tmp_path / "focal"), str(tmp_path / "grid"), "--out", str(tmp_path / "map.png")]
    for _ in range(2):  # what it made itself may be made again
        assert main([*arguments, "--json", str(tmp_path / "map.json")]) == 0
    with PIL.Image.open(tmp_path / "map.png") as picture:
        assert picture.width == 16 + 3 * 336
    record = json.loads((tmp_path / "map.json").read_text())
    assert record["settings"] == {"window": [4, 6, 8], "task": None, "noise": 20.0, "sigma": 1.2, "steps": 3}
    indices = [each["diffusion_index"] for each in record["attributions"]]
    lines = capsys.readouterr().out.splitlines()
    assert [f"{index:.3f}" for index in indices] == [line.split()[0] for line in lines[1:3]]
    assert all(0 < index < 100 for index in indices) and indices[0] != indices[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "map.jpg"], "--out must be a .png file"),
        (["--noise", "-1"], "--noise must be"),
        (["--window", "30", "0", "8"], "window must"),
        (["--out", "photo.png"], "--out must not overwrite an input"),
        (["--out", "other.png"], "--out must be a new file"),
        (["--json", "other.png"], "--json must be a new file"),
        (["--model", "nowhere"], "model must be a folder"),
    ],
)
def test_wrong_calls(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "other.png"):
        PIL.Image.fromarray((photo() * 255).byte().permute(1, 2, 0).numpy()).save(name)
    assert main(["attribute", "photo.png", "--window", "2", "2", "8", "--out", "map.png", *change]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "map.png").exists()
