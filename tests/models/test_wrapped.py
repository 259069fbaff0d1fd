"""Checkpoints into models that are compiled, parallel, averaged or without memory; errors under autocast."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ipt_fast
from tests.models.micro import micro_model
from tests.modules.changed import ipt

BUILD = {"training": micro_model, "merged": lambda: micro_model(merged=True), "ipt": ipt}


def compiled_in_part(model):
    for name, child in list(model.named_children()):
        if name in ("latent", "body"):
            setattr(model, name, torch.compile(child, backend="eager"))
    return model


WRAP = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "compiled in part": compiled_in_part,
    "parallel": torch.nn.DataParallel,
    "averaged": AveragedModel,
    "compiled and averaged": lambda model: AveragedModel(torch.compile(model, backend="eager")),
}


@pytest.fixture(params=BUILD)
def form(request):
    return request.param


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in own.items())


@pytest.mark.parametrize("wrap", WRAP)
def test_into_and_from_wrapped_models(form, wrap, tmp_path):
    torch.manual_seed(0)
    source = BUILD[form]()
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    torch.manual_seed(1)
    inner = BUILD[form]()
    outer = WRAP[wrap](copy.deepcopy(inner))
    assert not same(inner, source.state_dict())
    assert ipt_fast.load_checkpoint(outer, tmp_path / "plain.pth") is outer
    loaded = {name.replace("_orig_mod.", "").removeprefix("module."): v for name, v in outer.state_dict().items()}
    loaded.pop("n_averaged", None)
    loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    assert loaded.keys() == source.state_dict().keys()
    assert all(torch.equal(value, loaded[name]) for name, value in source.state_dict().items())
    torch.save(outer.state_dict(), tmp_path / "wrapped.pth")
    torch.manual_seed(2)
    again = ipt_fast.load_checkpoint(BUILD[form](), tmp_path / "wrapped.pth")
    assert same(again, source.state_dict())


def test_of_an_average_that_counts(tmp_path):
    model = micro_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    torch.save({"ema": average.state_dict()}, tmp_path / "ema.pth")
    merged = ipt_fast.load_checkpoint(micro_model(merged=True), tmp_path / "ema.pth")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), average(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_a_model_on_the_meta_device(form, dtype, tmp_path):
    source = BUILD[form]().to(dtype)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = BUILD[form]().to("meta")
    switches = {name: p.requires_grad for name, p in model.named_parameters()}
    ipt_fast.load_checkpoint(model, tmp_path / "weights.pth")
    assert not any(value.is_meta for value in model.state_dict().values())
    assert all(p.dtype == torch.float32 for p in model.parameters())  # the model's, as when copied
    assert {name: p.requires_grad for name, p in model.named_parameters()} == switches
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name].to(value.dtype), value), name


def test_into_a_model_in_part_on_the_meta_device(tmp_path):
    source, model = micro_model(), micro_model()
    model.latent.to("meta")
    kept = model.embed.weight
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    ipt_fast.load_checkpoint(model, tmp_path / "weights.pth")
    assert same(model, source.state_dict()) and kept.device == model.embed.weight.device


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("name", ["ipt_v2", "ipt"])
def test_images_of_a_wrong_dtype_under_autocast(name, dtype):
    model = micro_model() if name == "ipt_v2" else ipt()
    x = torch.ones(1, 3, 12, 12).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"x .*{dtype}"):
        model(x)


def test_double_models_under_autocast():
    model = micro_model().double()
    x = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), expected)
            with pytest.raises(TypeError, match="autocast leaves float64 as it is"):
                model(x.float())
