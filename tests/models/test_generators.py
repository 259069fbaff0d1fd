"""What all models that generate do: conditions, their errors, dropped labels; `restore` refuses them."""

import PIL.Image
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ipt_fast
from ipt_fast.attribution import local_attribution_map
from ipt_fast.cli import main
from ipt_fast.models import describe
from tests.models.generators import conditions, randomised

TINY = {
    "dit_s_2": {"width": 8, "layers": 1, "heads": 2, "sample_size": 8, "num_classes": 5},
    "latent_ipt_v2_s": {
        "width": 4,
        "depths": (2, 1, 2),
        "heads": (1, 2, 2),
        "sample_size": 8,
        "num_classes": 5,
    },
}


def tiny(name, **config):
    return randomised(ipt_fast.create_model(name, **TINY[name] | config)).eval()


@pytest.fixture(params=TINY)
def name(request):
    return request.param


def test_call_and_contract(name):
    model = tiny(name)
    latents, timestep, labels = conditions(model)
    out = model(latents, timestep, labels)
    assert out.shape == (2, 8, 8, 8)
    assert torch.equal(model(latents=latents, timestep=timestep, class_labels=labels), out)
    assert torch.equal(model(latents, timestep.float(), labels), out)
    assert torch.equal(model(latents, timestep.double(), labels.int()), out)
    others = [model(latents.flip(0), timestep, labels), model(latents, timestep.flip(0), labels)]
    others.append(model(latents, timestep, (labels + 1) % 6))
    assert not any(torch.allclose(other, out) for other in others)
    contract = describe(model)
    assert (contract.in_channels, contract.out_channels, contract.objective) == (4, 8, "diffusion")
    assert contract.generates


def test_channels_and_classes(name):
    model = tiny(name, in_channels=3, learn_variance=False)
    assert model(*conditions(model)).shape == (2, 3, 8, 8)
    model = tiny(name, num_classes=0)
    latents, timestep, labels = conditions(model)
    assert labels is None
    assert torch.equal(model(latents, timestep), model(latents, timestep, None))
    assert torch.equal(model.train()(latents, timestep), model(latents, timestep))
    with pytest.raises(ValueError, match="class_labels must be None for a model without classes"):
        model(latents, timestep, torch.zeros(2, dtype=torch.int64))


def test_dropped_labels(name):
    model = tiny(name, label_dropout=0.5)
    latents, timestep, _ = conditions(model, batch=64)
    latents, timestep = latents[:1].expand(64, -1, -1, -1), timestep[:1].expand(64)
    labels = torch.zeros(64, dtype=torch.int64)
    known, null = model(latents, timestep, labels), model(latents, timestep, labels + 5)
    model.train()
    torch.manual_seed(3)
    out = model(latents, timestep, labels)
    torch.manual_seed(3)
    dropped = torch.rand(64) < 0.5
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(out, torch.where(dropped[:, None, None, None], null, known), rtol=1e-5, atol=1e-5)
    state = torch.get_rng_state()
    tiny(name, label_dropout=0).train()  # draws weights
    torch.set_rng_state(state)
    without = tiny(name, label_dropout=0).train()
    state = torch.get_rng_state()
    without(latents, timestep, labels)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"timestep": torch.tensor([0, 1000])}, ValueError, "timestep must be 0 to 999; got 1000"),
        ({"timestep": torch.tensor([-1, 0])}, ValueError, "timestep must be 0 to 999; got -1"),
        ({"timestep": torch.tensor([0, float("nan")])}, ValueError, "timestep must be 0 to 999; got nan"),
        ({"timestep": torch.tensor([0])}, ValueError, r"timestep must be \(2,\), one for each image; got \(1,\)"),
        ({"timestep": torch.tensor([True, False])}, TypeError, "timestep must be an int64.*got torch.bool"),
        ({"timestep": 3}, TypeError, "timestep must be an int64, int32 or floating-point tensor; got int"),
        ({"timestep": torch.zeros(2, device="meta")}, ValueError, "timestep must be on cpu as latents; got meta"),
        ({"class_labels": torch.tensor([6, 0])}, ValueError, "class_labels must be 0 to 5; got 6"),
        ({"class_labels": torch.tensor([0, -1])}, ValueError, "class_labels must be 0 to 5; got -1"),
        ({"class_labels": torch.zeros(2)}, TypeError, "class_labels must be an int64 or int32.*got torch.float32"),
        ({"class_labels": None}, ValueError, r"class_labels must be given, one of 0 to 5 for each image \(5 is no"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, ValueError, r"latents must be \(B, 4, H, W\)"),
        ({"latents": torch.zeros(2, 4, 8, 8).long()}, TypeError, "latents must be a floating-point tensor"),
        ({"latents": torch.zeros(2, 4, 8, 8).double()}, TypeError, "latents must have the weights' dtype"),
    ],
)
def test_bad_conditions(name, change, error, message):
    model = tiny(name)
    inputs = dict(zip(("latents", "timestep", "class_labels"), conditions(model), strict=True))
    with pytest.raises(error, match=message):
        model(**inputs | change)


def test_no_null_class_without_dropout(name):
    model = tiny(name, label_dropout=0)
    latents, timestep, labels = conditions(model)
    model(latents, timestep, labels)
    with pytest.raises(ValueError, match="class_labels must be 0 to 4; got 5"):
        model(latents, timestep, torch.full((2,), 5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_classes": -1}, "num_classes must be an int of at least 0; got -1"),
        ({"label_dropout": 1.0}, "label_dropout must be a number of at least 0 and below 1; got 1.0"),
        ({"in_channels": 0}, "in_channels must be an int of at least 1; got 0"),
        ({"sample_size": 8.0}, "sample_size must be an int of at least 1; got 8.0"),
        ({"colour": 3}, "config must have fields of .*sample_size.*; got colour"),
    ],
)
def test_bad_config(name, config, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **config)


def test_restoring_is_refused(name):
    message = "model must restore images; got one that generates them"
    with pytest.raises(ValueError, match=message):
        ipt_fast.restore(torch.rand(1, 3, 8, 8), tiny(name))
    with pytest.raises(ValueError, match=message):
        local_attribution_map(tiny(name), torch.rand(3, 8, 8), window=(0, 0, 4))


def test_commands_refuse_them(name, tmp_path, capsys):
    tiny(name).save_pretrained(tmp_path / "model")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    for command in (["restore", "in.png", "out.png"], ["eval", "--data", "in.png", "--sigma", "25"]):
        paths = [str(tmp_path / word) if word.endswith(".png") else word for word in command]
        assert main([*paths, "--model", str(tmp_path / "model")]) == 2
        assert "model must restore images; got one that generates them" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_bfloat16(name):
    model = tiny(name)
    inputs = conditions(model)
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(*inputs)
    in_bfloat16 = model.bfloat16()(inputs[0].bfloat16(), *inputs[1:])
    for out in (under_autocast, in_bfloat16):
        assert out.dtype == torch.bfloat16
        assert (out - expected).abs().max() < 0.05 * expected.abs().max()


def test_fake_tensors(name):
    """By which a program learns shapes and costs without computing; they have no values to check."""
    model = tiny(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(*conditions(model)).shape == (2, 8, 8, 8)
