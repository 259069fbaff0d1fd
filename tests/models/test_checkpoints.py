"""Saving and loading: offline, strictly, and never half."""

import collections
import dataclasses
import json
import os
import pickle
import socket

import pytest
import safetensors.torch
import torch

import ipt_fast
from ipt_fast._files import atomic_write
from ipt_fast.models import IPTV2, open_model, record
from ipt_fast.models.checkpoint import read_state_dict
from tests.models.micro import CONFIG, micro_model


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test here may reach the network."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def image():
    return torch.rand(1, 3, 13, 18)


def other_model(**config):
    """A model of the same shape with other weights."""
    torch.manual_seed(1)
    return micro_model(**config)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before):
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())


# -- save_pretrained and from_pretrained ------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("norm", ["bias_free", "with_bias"])
def test_round_trip(tmp_path, image, merged, norm):
    model = micro_model(norm=norm)
    if merged:
        model.reparameterize()
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]
    for opened in (IPTV2.from_pretrained(tmp_path / "new" / "folder"), open_model(str(tmp_path / "new" / "folder"))):
        assert opened.config == model.config and not opened.training
        assert torch.equal(opened(image), model(image))


def test_config_json(tmp_path):
    model = micro_model(in_channels=6)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    fields = {field.name for field in dataclasses.fields(model.config)}
    assert fields <= written.keys()
    assert type(model.config)(**{name: written[name] for name in fields}) == model.config


def test_saving_leaves_model_and_neighbours_alone(tmp_path, image):
    model = micro_model().train()
    (tmp_path / "notes.txt").write_text("mine")
    expected = model(image)
    model.save_pretrained(tmp_path)
    other_model().save_pretrained(tmp_path)
    assert model.training and torch.equal(model(image), expected)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.txt"]
    assert torch.equal(IPTV2.from_pretrained(tmp_path)(image), other_model()(image))


def test_half_precision_files(tmp_path, image):
    model = micro_model().bfloat16()
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {name for name, value in stored.items() if value.dtype != torch.bfloat16} == {record.NAME}
    opened = IPTV2.from_pretrained(tmp_path)
    assert all(torch.equal(a, b.float()) for a, b in zip(opened.parameters(), model.parameters(), strict=True))


def test_training_folder_opens_merged_but_not_the_reverse(tmp_path, image):
    model = micro_model()
    model.save_pretrained(tmp_path)
    merged = IPTV2.from_pretrained(tmp_path, merged=True)
    assert merged.config.merged is True
    assert (merged(image) - model(image)).abs().max() <= 1e-5 * model(image).abs().max()
    merged.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merged"):
        IPTV2.from_pretrained(tmp_path, merged=False)


def damage(folder, what):
    weights, config = folder / "model.safetensors", folder / "config.json"
    match what:
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "empty weights":
            weights.write_bytes(b"")
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "half a header":
            weights.write_bytes(weights.read_bytes()[:20])
        case "noise":
            weights.write_bytes(bytes(range(256)) * 100)
        case "no JSON":
            config.write_text("{width: 3")
        case "another JSON":
            config.write_text("[1, 2]")
        case "bytes":
            config.write_bytes(b"\xff\xfe\x00\x80")
        case "unknown field":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"colour": 3}))
        case "bad field":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"width": "wide"}))
        case "another width":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"width": 16}))
        case "another architecture":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"model": "Restormer"}))


DAMAGES = [
    "no weights",
    "no config",
    "empty weights",
    "truncated weights",
    "half a header",
    "noise",
    "no JSON",
    "bytes",
]
DAMAGES += ["another JSON", "unknown field", "bad field", "another width", "another architecture"]


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_folders(tmp_path, what):
    micro_model().save_pretrained(tmp_path)
    damage(tmp_path, what)
    for opener in (IPTV2.from_pretrained, open_model):
        with pytest.raises(ValueError if what != "no weights" else (ValueError, OSError)) as caught:
            opener(tmp_path)
        assert len(str(caught.value)) < 600  # one sentence, not a list of all parameters


def test_sources_that_do_not_exist(tmp_path):
    for source in (tmp_path / "nothing", "nobody/nothing", ""):
        with pytest.raises(ValueError, match="source must be a folder"):
            IPTV2.from_pretrained(source)
        with pytest.raises(ValueError, match="model|ipt_v2_tiny"):
            open_model(source)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="directory must be a folder that can be written"):
            micro_model().save_pretrained(folder)
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_a_failing_save_keeps_the_old_files(tmp_path, image, monkeypatch):
    model = micro_model()
    model.save_pretrained(tmp_path)

    def fail(state, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        other_model(merged=True).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert torch.equal(IPTV2.from_pretrained(tmp_path)(image), model(image))


def test_atomic_write(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_write(target) as path:
        assert path.parent == tmp_path and path.suffix == ".txt" and path != target
        path.write_text("first")
        assert not target.exists()
    with pytest.raises(KeyError), atomic_write(target) as path:
        path.write_text("second")
        raise KeyError
    assert target.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


# -- load_checkpoint --------------------------------------------------------------------------------------------------

WRAPPINGS = {
    "plain": lambda state: state,
    "ordered": lambda state: collections.OrderedDict(state),
    "params_ema": lambda state: {"params": {k: 0 * v for k, v in state.items()}, "params_ema": state},
    "params": lambda state: {"params": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 1.0}},
    "model": lambda state: {"model": state, "step": 7},
    "nested": lambda state: {"state_dict": {"params": state}},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
    "both, the other way": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_and_prefixes(tmp_path, wrapping, image):
    source, target = micro_model(), other_model()
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "weights.pth")
    ipt_fast.load_checkpoint(target, tmp_path / "weights.pth")
    assert torch.equal(target(image), source(image))


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "ckpt", "bin"])
def test_suffixes(tmp_path, suffix, image):
    source, target = micro_model(), other_model()
    path = tmp_path / f"weights.{suffix}"
    safetensors.torch.save_file(source.state_dict(), path) if suffix == "safetensors" else torch.save(
        source.state_dict(), path
    )
    ipt_fast.load_checkpoint(target, str(path))
    assert torch.equal(target(image), source(image))


def test_training_file_into_a_merged_model_but_not_the_reverse(tmp_path, image):
    source = micro_model()
    torch.save({"params": source.state_dict()}, tmp_path / "training.pth")
    merged = other_model(merged=True)
    ipt_fast.load_checkpoint(merged, tmp_path / "training.pth")
    assert (merged(image) - source(image)).abs().max() <= 1e-5 * source(image).abs().max()
    reparameterized = other_model()
    reparameterized.reparameterize()
    ipt_fast.load_checkpoint(reparameterized, tmp_path / "training.pth")
    assert torch.equal(reparameterized(image), merged(image))

    torch.save(merged.state_dict(), tmp_path / "merged.pth")
    target = other_model()
    before = snapshot(target)
    with pytest.raises(ValueError, match="merged"):
        ipt_fast.load_checkpoint(target, tmp_path / "merged.pth")
    assert_untouched(target, before)
    ipt_fast.load_checkpoint(reparameterized, tmp_path / "merged.pth")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def bad_file(path, what):
    state = micro_model().state_dict()
    name = next(iter(state))
    match what:
        case "missing key":
            state.pop(name)
        case "unexpected key":
            state["nonsense"] = torch.ones(1)
        case "another shape":
            state[name] = torch.ones(2, 2)
        case "another model":
            state = torch.nn.Conv2d(3, 3, 3).state_dict()
        case "another width":
            state = micro_model(width=16).state_dict()
        case "another norm":
            state = micro_model(norm="with_bias").state_dict()
        case "a number for a tensor":
            state[name] = 3
        case "no tensors":
            state = {"epoch": 3}
        case "nothing":
            state = {}
        case "empty wrapper":
            state = {"params": {}}
        case "a list":
            state = [torch.ones(1)]
        case "a tensor":
            state = torch.ones(3)
        case "numbers as names":
            state = {0: torch.ones(1)}
        case "the same name twice":
            state[f"module.{name}"] = torch.zeros_like(state[name])
        case "malicious":
            state = {"params": state, "extra": Malicious()}
        case "a whole model":
            state = micro_model()
    torch.save(state, path)
    content = path.read_bytes()
    match what:
        case "empty file":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "noise":
            path.write_bytes(bytes(range(256)) * 10)
        case "text":
            path.write_text("<html>404 not found</html>")
        case "a plain pickle":
            path.write_bytes(pickle.dumps({"params": [1, 2]}))
        case "an old pickle":
            path.write_bytes(b"cos\nsystem\n(S'mkdir hacked'\ntR.")


BAD_FILES = ["missing key", "unexpected key", "another shape", "another model", "another width", "another norm"]
BAD_FILES += ["a number for a tensor", "no tensors", "nothing", "empty wrapper", "a list", "a tensor", "empty file"]
BAD_FILES += ["numbers as names", "the same name twice", "malicious", "a whole model", "truncated", "noise", "text"]
BAD_FILES += ["a plain pickle", "an old pickle"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused_and_the_model_left_untouched(tmp_path, monkeypatch, what, merged):
    monkeypatch.chdir(tmp_path)
    bad_file(tmp_path / "weights.pth", what)
    model = other_model(merged=merged)
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        ipt_fast.load_checkpoint(model, tmp_path / "weights.pth")
    assert "weights.pth" in str(caught.value)
    assert_untouched(model, before)
    assert os.listdir(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize("cut", [1, 8, 9, 100, 5000, -1, -4000])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_anywhere(tmp_path, suffix, cut):
    path = tmp_path / f"weights.{suffix}"
    model = micro_model()
    safetensors.torch.save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(
        model.state_dict(), path
    )
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="weights"):
        ipt_fast.load_checkpoint(model, path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises((OSError, ValueError), match=r"no\.|model\.safetensors"):
            ipt_fast.load_checkpoint(micro_model(), path)


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    ipt_fast.create_model("ipt_v2_tiny").save_pretrained(tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_read_state_dict_gives_the_bare_tensors(tmp_path):
    torch.save({"params_ema": {"module.a": torch.arange(3.0)}}, tmp_path / "a.pth")
    state = read_state_dict(tmp_path / "a.pth")
    assert state.keys() == {"a"} and torch.equal(state["a"], torch.arange(3.0))


# -- shipped weights --------------------------------------------------------------------------------------------------


def test_pretrained_tiny_denoises():
    model = ipt_fast.create_model("ipt_v2_tiny", pretrained=True)
    assert not model.training
    rows, columns = torch.meshgrid(torch.arange(64) / 9, torch.arange(72) / 11, indexing="ij")
    clean = torch.stack([rows.sin(), columns.cos(), (rows + columns).sin()])[None] * 0.3 + 0.5
    for sigma in (15, 25, 50):
        noisy = clean + torch.randn_like(clean) * sigma / 255
        with torch.no_grad():
            restored = model(noisy)
        gain = 10 * torch.log10((noisy - clean).square().mean() / (restored - clean).square().mean())
        assert gain > 6, f"only {gain:.1f} dB gained at sigma {sigma}"


def test_pretrained_tiny_in_both_forms(image):
    training = ipt_fast.create_model("ipt_v2_tiny", pretrained=True)
    merged = ipt_fast.create_model("ipt_v2_tiny", pretrained=True, merged=True)
    assert (training.config.merged, merged.config.merged) == (False, True)
    assert (merged(image) - training(image)).abs().max() <= 1e-5 * training(image).abs().max()
    assert torch.equal(open_model("ipt_v2_tiny")(image), training(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_of_16_bits_is_merged_in_the_precision_of_the_model(tmp_path, dtype):
    model = ipt_fast.create_model("ipt_v2_tiny", **CONFIG)
    model.save_pretrained(tmp_path, dtype=dtype)
    merged, later = (type(model).from_pretrained(tmp_path, merged=form) for form in (True, False))
    later.reparameterize()
    for name, value in later.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


def test_pretrained_elsewhere_is_refused():
    with pytest.raises(ValueError, match="ipt_v2_tiny"):
        ipt_fast.create_model("ipt_v2_base", pretrained=True)
    with pytest.raises(ValueError):
        ipt_fast.create_model("ipt_v2_tiny", pretrained=True, in_channels=1)
    with pytest.raises(ValueError):
        ipt_fast.create_model("ipt_v2_tiny", pretrained=True, **CONFIG)
    for change in ({"heads": 12}, {"pos_every": True}, {"tasks": ("sr_x2", "derain", "denoise30", "denoise40")}):
        with pytest.raises(ValueError, match="as in the weights that ship for ipt_tiny; got"):
            ipt_fast.create_model("ipt_tiny", pretrained=True, **change)
    same = {"heads": 6, "tasks": ("sr_x2", "derain", "denoise30", "denoise50")}
    assert ipt_fast.create_model("ipt_tiny", pretrained=True, **same).config.heads == 6


def test_wrong_kinds_of_model_and_file(tmp_path):
    model = micro_model()
    with pytest.raises(ValueError, match="path must be a file of weights; got"):
        ipt_fast.load_checkpoint(model, tmp_path / "missing.pth")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        ipt_fast.load_checkpoint(None, tmp_path / "missing.pth")
    with pytest.raises(TypeError, match="config must be an IPTV2Config"):
        ipt_fast.models.IPTV2({"width": 16})


def test_model_merged_in_part_is_not_saved(tmp_path):
    model = micro_model()
    next(module for module in model.modules() if isinstance(module, ipt_fast.modules.RepLeFFN)).reparameterize()
    with pytest.raises(ValueError, match="merged in part"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.reparameterize()
    model.save_pretrained(tmp_path / "out")
    assert type(model).from_pretrained(tmp_path / "out").config.merged
