"""spandrel opens IPT-V2, and Restorer, accelerate and describe take what spandrel opens."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast.integrations import spandrel as integration
from ipt_fast.models import Contract, Sizes, as_module, describe, open_model, record
from tests.models.micro import micro_model
from tests.oracles.foreign import MODELS, load_foreign, spandrel, write_foreign

IMAGE = torch.rand(1, 3, 19, 27, generator=torch.Generator().manual_seed(0))
ODD = [
    {"in_channels": 1, "norm": "with_bias", "ffn": "gdfn", "order": "grid"},
    {"in_channels": 6, "order": "parallel", "refinement": 1, "merged": True},
    {"scale": 2, "window_size": 8, "ffn": "leffn", "attention": "released", "downsample_kernel": 1},
]
PRESETS = [{"name": f"ipt_v2_{size}"} for size in ("tiny", "small", "base", "base_plus")]


# -- spandrel opens IPT-V2 --------------------------------------------------------------------------------------


def small(name="ipt_v2_tiny", **config):
    """A model of a preset that differs from it in what makes it large."""
    torch.manual_seed(0)
    return ipt_fast.create_model(name, width=8, depths=(1, 1, 1, 1), **config).eval()


@pytest.mark.parametrize("config", PRESETS + ODD, ids=str)
def test_spandrel_opens_ipt_v2(config, tmp_path):
    library, registry = spandrel(), spandrel().MAIN_REGISTRY.copy()
    integration.install(registry)
    integration.install(registry)
    assert len(registry) == len(library.MAIN_REGISTRY) + (integration.ID not in library.MAIN_REGISTRY)
    model = small(**config)
    image = torch.rand(1, model.config.in_channels, 19, 27)
    expected = model(image).detach().clamp(0, 1)
    model.save_pretrained(tmp_path)
    torch.save({"params": integration.state_dict(model)}, tmp_path / "weights.pth")
    for file in ("model.safetensors", "weights.pth"):
        descriptor = library.ModelLoader(registry=registry).load_from_file(tmp_path / file)
        assert torch.equal(descriptor(image), expected)
        assert descriptor.model.config == model.config
        assert (descriptor.scale, descriptor.purpose) == (
            model.config.scale,
            "SR" if "scale" in config else "Restoration",
        )
        assert (descriptor.input_channels, descriptor.output_channels) == (image.shape[1], expected.shape[1])
        assert descriptor.supports_half and descriptor.supports_bfloat16 and descriptor.size_requirements.none
    half = descriptor.half()(image.half()).float()
    assert (half - expected).abs().max() < 0.02


def test_only_files_with_the_config_are_taken_for_ours():
    registry = spandrel().MAIN_REGISTRY.copy()
    integration.install(registry)
    first = registry.architectures("detection")[0].architecture
    assert first.id == integration.ID
    model = micro_model()
    assert first.detect(integration.state_dict(model)) and not first.detect(model.state_dict())
    assert [each.architecture.id for each in registry if each.detect(model.state_dict())] == []


def test_a_fresh_process(tmp_path):
    spandrel()
    model = small()
    model.save_pretrained(tmp_path)
    torch.save((IMAGE, model(IMAGE).detach().clamp(0, 1)), tmp_path / "images.pt")
    program = f"""
import torch
from tests.oracles.public import public_module
spandrel = public_module("spandrel")
from ipt_fast.integrations.spandrel import install
install()
image, expected = torch.load("{tmp_path}/images.pt")
descriptor = spandrel.ModelLoader().load_from_file("{tmp_path}/model.safetensors")
assert descriptor.architecture.name == "IPT-V2"
assert torch.equal(descriptor(image), expected)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_the_config_is_in_files_only(tmp_path):
    """Models, and files from before, are what they were."""
    model, other = micro_model(), micro_model()
    assert record.NAME not in model.state_dict() and not list(model.buffers())
    recorded = integration.state_dict(model)
    assert recorded.keys() - model.state_dict().keys() == {record.NAME}
    assert recorded[record.NAME].dtype == torch.int32 and recorded[record.NAME][0] == record.VERSION
    for state in (model.state_dict(), recorded):
        other.load_state_dict(state)
        torch.save(state, tmp_path / "weights.pth")
        ipt_fast.load_checkpoint(other, tmp_path / "weights.pth")
        assert torch.equal(other(IMAGE), model(IMAGE))
    assert record.NAME in recorded
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(recorded | {"another": recorded[record.NAME]})
    inside = nn.Sequential(other)
    inside.load_state_dict({f"0.{name}": value for name, value in recorded.items()})


def test_a_file_that_tells_what_it_is(tmp_path):
    model = micro_model(grid_size=2)
    torch.save({"params_ema": integration.state_dict(model)}, tmp_path / "weights.pth")
    opened = open_model(tmp_path / "weights.pth")
    assert opened.config == model.config and torch.equal(opened(IMAGE), model(IMAGE))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="must be a file that tells what it is, .* got .*weights.pth, which does not"):
        open_model(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([2, 123, 125], "must be of version 1, which this version of ipt_fast reads; got 2"),
        ([1, 123], "must hold JSON"),
        ([1, 91, 93], "must hold one JSON object; got list"),
        ([1, 123, 125], "must be one of .*IPTV2"),
    ],
)
def test_configs_that_cannot_be_read(codes, message, tmp_path):
    state = micro_model().state_dict() | {record.NAME: torch.tensor(codes, dtype=torch.int32)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "weights.pth")
    spandrel()
    with pytest.raises(ValueError, match=f"takes for IPT-V2, but cannot open .*{message}"):
        integration.load_file(tmp_path / "weights.pth")


def test_models_that_spandrel_cannot_open():
    with pytest.raises(TypeError, match="model must be an IPTV2, which spandrel can open by install"):
        integration.state_dict(ipt_fast.create_model("ipt_tiny"))


# -- what spandrel opens ----------------------------------------------------------------------------------------


def errors(found, descriptor, image):
    """Largest errors of an output and of the descriptor's own, of what it is in float64."""
    wide = copy.deepcopy(descriptor)
    wide.model.double()
    truth = wide(image.double())
    return [((each.double() - truth).abs().max() / truth.abs().max()).item() for each in (found, descriptor(image))]


@pytest.mark.parametrize("name", MODELS)
def test_restorer_takes_descriptors(name):
    """At a size that is no multiple of anything: what the descriptor pads, the restorer does."""
    descriptor = load_foreign(name)
    image = IMAGE[:, : descriptor.input_channels]
    restored = ipt_fast.restore(image, descriptor, dtype="float32")
    assert restored.shape == (1, descriptor.output_channels, 19 * descriptor.scale, 27 * descriptor.scale)
    found, own = errors(restored.clamp(0, 1), descriptor, image)
    assert found <= max(2 * own, 8 * torch.finfo(torch.float32).eps)


def test_tiles_fit_the_model():
    """Of a model whose sides are multiples of 8, tiles of 20 pixels become 24: the first one sees just that."""
    descriptor = load_foreign("Restormer")
    image = torch.rand(1, 3, 40, 61)
    restored = ipt_fast.restore(image, descriptor, tile=20, overlap=0, dtype="float32")
    found, own = errors(restored[..., :16, :16].clamp(0, 1), Cut(descriptor, 16), image[..., :24, :24])
    assert found <= max(2 * own, 8 * torch.finfo(torch.float32).eps)


class Cut:
    """A descriptor whose output is cut to its first rows and columns."""

    def __init__(self, descriptor, side):
        self.model, self._descriptor, self._side = descriptor.model, descriptor, side

    def __call__(self, image):
        return self._descriptor(image)[..., : self._side, : self._side]


def test_contract_of_a_descriptor():
    descriptor = load_foreign("SwinIR")
    contract = describe(descriptor)
    assert (contract.in_channels, contract.out_channels, contract.scale(None)) == (3, 3, 2)
    assert contract.sizes == Sizes(16, 1) and not contract.whole
    assert contract.dtypes == (torch.float32, torch.bfloat16)
    descriptor.supports_half, descriptor.supports_bfloat16 = True, False
    descriptor.tiling = spandrel().ModelTiling.INTERNAL
    contract = describe(descriptor)
    assert contract.dtypes == (torch.float32, torch.float16) and contract.whole
    module = as_module(descriptor)
    assert module.model is descriptor.model and describe(module).dtypes == contract.dtypes
    assert describe(ipt_fast.Restorer(module).model).sizes == Sizes(16, 1)


def test_a_dtype_is_chosen_among_those_of_the_contract(monkeypatch):
    monkeypatch.setattr("ipt_fast._precision._fastest_dtype", lambda device: torch.bfloat16)
    descriptor = load_foreign("Compact")
    assert ipt_fast.Restorer(descriptor).dtype == torch.bfloat16
    descriptor.supports_bfloat16 = False
    assert ipt_fast.Restorer(descriptor).dtype == torch.float32
    assert ipt_fast.Restorer(descriptor, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        (Sizes(), (5, 7), (5, 7)),
        (Sizes(minimum=16), (5, 17), (16, 17)),
        (Sizes(multiple_of=8), (8, 9), (8, 16)),
        (Sizes(minimum=10, multiple_of=8), (3, 20), (16, 24)),
        (Sizes(multiple_of=8, square=True), (8, 20), (24, 24)),
    ],
)
def test_sizes(sizes, given, expected):
    assert sizes.containing(*given) == expected
    needs = spandrel().SizeRequirements(sizes.minimum, sizes.multiple_of, sizes.square)
    right, bottom = needs.get_padding(given[1], given[0])
    assert (given[0] + bottom, given[1] + right) == expected


class Picky(nn.Module):
    """A module of ours whose contract asks for a size; it returns its input."""

    contract = Contract(in_channels=3, out_channels=3, sizes=Sizes(minimum=32, multiple_of=8, square=True))

    def forward(self, x):
        assert x.shape[2] == x.shape[3] and x.shape[2] % 8 == 0 and x.shape[2] >= 32
        return x


@pytest.mark.parametrize("tile", [None, 20, "auto"])
def test_any_module_may_ask_for_sizes(tile):
    image = torch.rand(2, 3, 45, 70)
    torch.testing.assert_close(ipt_fast.restore(image, Picky(), tile=tile, dtype="float32"), image)


def test_what_is_neither_a_module_nor_a_descriptor():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, .* or a descriptor of spandrel; got str"):
        ipt_fast.Restorer("model.pth")
    for name in ("minimum", "multiple_of"):
        with pytest.raises(ValueError, match=f"{name} must be a positive int; got 0"):
            Sizes(**{name: 0})


def test_inpainting_is_refused():
    descriptor = load_foreign("Compact")
    library = spandrel()
    masked = library.MaskedImageModelDescriptor(
        descriptor.model, descriptor.model.state_dict(), descriptor.architecture, "Inpainting", [], True, True, 3, 3
    )
    with pytest.raises(ValueError, match="must restore an image by itself; got one of .*, which needs a mask"):
        ipt_fast.Restorer(masked)


# -- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_files(suffix, tmp_path):
    descriptor = integration.load_file(write_foreign(tmp_path / f"model{suffix}", "Compact"))
    assert torch.equal(descriptor(IMAGE), load_foreign("Compact")(IMAGE))


def test_wrong_files(tmp_path):
    spandrel()
    for name, content, message in (
        ("none.pth", None, "got .*none.pth, which is not there"),
        ("model.onnx", b"x", "got .*model.onnx, which has another suffix"),
        ("damaged.pth", b"damaged", "must be a readable file of weights; got .*damaged.pth"),
        ("damaged.safetensors", b"damaged", "must be a readable file of weights; got .*damaged.safetensors"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            integration.load_file(tmp_path / name)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="must be a model that spandrel .* knows; got .*linear.pth, whose 2 tensors"):
        integration.load_file(tmp_path / "linear.pth")
    state = torch.load(write_foreign(tmp_path / "swinir.pth", "SwinIR"))["params"]
    state["layers.0.residual_group.blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "swinir.pth")
    with pytest.raises(ValueError, match="got .*swinir.pth, which spandrel .* takes for SwinIR, but cannot open"):
        integration.load_file(tmp_path / "swinir.pth")


def test_without_spandrel(monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    for call in (integration.install, lambda: integration.load_file("model.pth")):
        with pytest.raises(ImportError, match=r"spandrel is needed: pip install 'ipt-fast\[spandrel\]'"):
            call()
