"""Frozen models compute what the model does, bit for bit, and nothing can change them."""

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

import ipt_fast
from ipt_fast import _extension, modules
from ipt_fast.freezing import Frozen, _FeedForward
from ipt_fast.inference import Restorer
from ipt_fast.modules import _fusion
from ipt_fast.modules.feed_forward import reparameterize
from ipt_fast.modules.transformer import EncoderLayer
from tests.models.micro import micro_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_kernels = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))


def merged(**config):
    model = micro_model(**config)
    model.reparameterize()
    return model


def plain(model, x, dtype=torch.float32, **arguments):
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(x, **arguments)


def packed_layers(frozen):
    forms = frozen._packed[1].modules()
    return sum("packed_layer" in form.__dict__ or isinstance(form, _FeedForward) for form in forms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 8), (21, 33), (48, 40)])
@pytest.mark.parametrize("norm", ["bias_free", "with_bias"])
def test_same_numbers_as_the_model_under_autocast(dtype, size, norm):
    model, x = merged(norm=norm), torch.rand(2, 3, *size)
    frozen = ipt_fast.freeze(model, dtype)
    output = frozen(x)
    assert torch.equal(output, plain(model, x, dtype))
    assert output.dtype == torch.float32 and not output.requires_grad


@pytest.mark.parametrize("name", ["ipt_v2_tiny", "ipt_v2_small", "ipt_v2_base", "ipt_v2_base_plus"])
def test_presets(name):
    model = ipt_fast.create_model(name, merged=True).eval()
    frozen, x = ipt_fast.freeze(model), torch.rand(1, 3, 16, 24)
    assert torch.equal(frozen(x), plain(model, x))
    if _extension.load():
        assert packed_layers(frozen) == len(ipt_fast.explain(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ipt(dtype):
    model = ipt_fast.create_model("ipt_tiny", pretrained=True)
    frozen, x = ipt_fast.freeze(model, dtype), torch.rand(2, 3, 48, 48)
    assert torch.equal(frozen(x, task="sr_x2"), plain(model, x, dtype, task="sr_x2"))


def test_branches_are_merged_and_the_model_is_left_as_it_is():
    model, x = micro_model().train(), torch.rand(1, 3, 24, 16)
    before = copy.deepcopy(model.state_dict())
    frozen = ipt_fast.freeze(model)
    assert model.training and not frozen.training and not model.config.merged and frozen.config.merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(frozen(x), plain(model.eval(), x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.embed.weight.zero_()
    assert frozen(x).std() > 0.01


class Users(nn.Module):
    """Somebody's model with modules of ours."""

    def __init__(self):
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = modules.LayerNorm2d(8)
        self.parts = nn.ModuleList(
            [
                modules.FocalContextSelfAttention(8, 2, 4),
                modules.GlobalGridSelfAttention(8, 2, 3),
                modules.RepLeFFN(8, merged=True),
            ]
        )
        self.exit = nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, image):
        x = self.entry(image.contiguous(memory_format=torch.channels_last))
        for part in self.parts:
            x = x + part(self.norm(x))
        return self.exit(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_in_the_model_of_a_user(dtype):
    model, x = Users().eval(), torch.rand(1, 3, 20, 20)
    frozen = ipt_fast.freeze(model, dtype)
    assert torch.equal(frozen(x), plain(model, x, dtype))
    if _extension.load():
        assert packed_layers(frozen) == 1  # the feed-forward network


@pytest.mark.parametrize("module", [modules.RepLeFFN(8, merged=True), modules.LayerNorm2d(8), nn.Conv2d(8, 4, 1)])
def test_modules_alone(module):
    x = torch.rand(1, 8, 9, 7)
    assert torch.equal(ipt_fast.freeze(module)(x), plain(module, x))


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(1, 1, 9, 15),
        torch.rand(2, 24, 1, 1),
        torch.rand(24, 9, 15),
        torch.rand(1, 64 * 64, 24).transpose(1, 2).view(1, 24, 64, 64),  # its batch has the stride of one pixel
        torch.rand(2, 24, 9, 1).contiguous(memory_format=torch.channels_last),
    ],
    ids=lambda x: "x".join(map(str, x.shape)),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_maps(x, dtype):
    conv = nn.Conv2d(x.shape[-3], 180, 3, padding=1)
    assert torch.equal(ipt_fast.freeze(conv, dtype)(x), plain(conv, x, dtype))


def test_what_is_changed_runs_as_it_is():
    model, seen = micro_model(), []
    model.reparameterize()
    model.latent[0].ffn.depthwise.register_forward_hook(lambda *_: seen.append("depthwise"))
    model.decoder[0].register_forward_hook(lambda module, args, output: 2 * output)
    model.embed = nn.Sequential(model.embed, nn.Identity())
    _fusion.remember(nn.Sequential)  # as accelerate() does, which must not make our own layers take it for theirs
    frozen, x = ipt_fast.freeze(model), torch.rand(1, 3, 16, 16)
    assert torch.equal(frozen(x), plain(model, x)) and seen == ["depthwise"] * 2
    reasons = {path: reason for path, reason in ipt_fast.explain(frozen).items() if reason}
    assert list(reasons) == ["latent.0.ffn"]
    if _extension.load():
        assert packed_layers(frozen) == len(ipt_fast.explain(frozen)) - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.to("cpu"),
        lambda f: f.float(),
        lambda f: f.half(),
        lambda f: f.double(),
        lambda f: f.cpu(),
        lambda f: f.train(),
        lambda f: f.requires_grad_(),
        lambda f: f.share_memory(),
        lambda f: f.load_state_dict({}),
        lambda f: f.state_dict(),
        lambda f: nn.Sequential(f).half(),
        lambda f: nn.Sequential(f).train(),
        lambda f: nn.Sequential(f).state_dict(),
        lambda f: nn.Sequential(f).load_state_dict({}),
    ],
)
def test_nothing_changes_it(change):
    frozen, x = ipt_fast.freeze(merged()), torch.rand(1, 3, 16, 16)
    before = frozen(x)
    with pytest.raises(RuntimeError, match="a frozen model cannot .*: (change|save) the model itself"):
        change(frozen)
    assert torch.equal(frozen(x), before)


def test_it_shows_no_parameters():
    frozen = ipt_fast.freeze(merged())
    assert not [*frozen.parameters()] and not [*frozen.buffers()] and not [*frozen.children()]
    assert frozen.eval() is frozen and frozen.requires_grad_(False) is frozen and not frozen.training


def test_no_gradients():
    frozen, x = ipt_fast.freeze(merged()), torch.rand(1, 3, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="x must not require a gradient"):
        frozen(x)
    with torch.no_grad():
        assert not frozen(x).requires_grad


def test_bad_input():
    frozen = ipt_fast.freeze(merged())
    with pytest.raises(TypeError, match=r"x must be torch.float32, .*; got torch.float64"):
        frozen(torch.rand(1, 3, 16, 16).double())
    with pytest.raises(TypeError, match="got torch.bfloat16"):
        frozen(torch.rand(1, 3, 16, 16).bfloat16())
    with pytest.raises(ValueError, match="x must be on cpu as the frozen model; got meta"):
        frozen(torch.rand(1, 3, 16, 16, device="meta"))
    with pytest.raises(ValueError, match="3, H, W"):
        frozen(torch.rand(1, 4, 16, 16))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got str"):
        ipt_fast.freeze("ipt_v2_tiny")
    with pytest.raises(ValueError, match="dtype must be"):
        ipt_fast.freeze(merged(), torch.float64)
    with pytest.raises(ValueError, match="model must be in float32.*; got torch.float64"):
        ipt_fast.freeze(merged().double())
    with pytest.raises(ValueError, match="weights in memory"):
        ipt_fast.freeze(merged().to("meta"))


def test_dtype_of_the_model_and_autocast_around_it():
    model, x = merged(), torch.rand(1, 3, 16, 16)
    half = copy.deepcopy(model).bfloat16()
    frozen = ipt_fast.freeze(half)
    assert frozen.dtype == torch.bfloat16 and frozen(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(frozen(x), plain(half.float(), x, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ipt_fast.freeze(model)(x), plain(model, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_and_files(dtype):
    frozen, x = ipt_fast.freeze(merged(), dtype), torch.rand(1, 3, 16, 24)
    expected, file = frozen(x), io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    for again in (
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(file, weights_only=False),
        ipt_fast.freeze(frozen),
    ):
        assert torch.equal(again(x), expected) and again.dtype == dtype


@needs_kernels
def test_other_instructions_are_packed_for_again(monkeypatch):
    levels = torch.ops.ipt_fast_cpu.isa_levels()
    model, x = merged(), torch.rand(1, 3, 16, 24)
    frozen = ipt_fast.freeze(model)
    for level in (*levels, *reversed(levels)):
        monkeypatch.setenv("IPT_FAST_CPU_ISA", level)
        assert torch.equal(frozen(x), plain(model, x))
        assert frozen._packed[0] == level
        assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), plain(model, x))


@needs_kernels
def test_packed_weights_are_of_one_level_and_one_dtype(monkeypatch):
    ffn, x = modules.RepLeFFN(8, merged=True), torch.rand(1, 8, 9, 7)
    packed = ipt_fast.freeze(ffn)._packed[1].__dict__["packed"]
    run, block = packed._run, packed._block
    assert torch.equal(run(x, block), plain(ffn, x))
    with pytest.raises(TypeError, match="x must be Float as the packed weights; got BFloat16"):
        run(x.bfloat16(), block)
    with pytest.raises(ValueError, match="x must have 8 channels; got 4"):
        run(x[:, :4], block)
    other = torch.ops.ipt_fast_cpu.leffn_layer_packed
    for wrong in (block[:100], block.float(), torch.zeros_like(block), torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="packed must be what pack_leffn returned"):
            run(x, wrong)
    with pytest.raises(ValueError, match="packed must be what pack_leffn_layer returned"):
        other(x, block)
    if len(levels := torch.ops.ipt_fast_cpu.isa_levels()) > 1:
        monkeypatch.setenv("IPT_FAST_CPU_ISA", levels[0])
        with pytest.raises(RuntimeError, match=f"packed must be packed for {levels[0]}, .* freeze the model again"):
            run(x, block)


def test_backends():
    model, x = merged(), torch.rand(1, 3, 16, 24)
    frozen = ipt_fast.freeze(model)
    with ipt_fast.use_backend("reference"):
        assert torch.equal(frozen(x), plain(model, x))
    with ipt_fast.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        frozen(x)


@needs_kernels
def test_threads():
    frozen = ipt_fast.freeze(merged())
    images = [torch.rand(1, 3, 16 + 8 * i, 24) for i in range(4)]
    expected = [frozen(x) for x in images]
    frozen, wrong = copy.deepcopy(frozen), []  # not packed yet

    def run(x, y):
        for _ in range(20):
            if not torch.equal(frozen(x), y):
                wrong.append(len(x))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(images, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_and_export(dtype):
    torch._dynamo.reset()
    model, x = merged(), torch.rand(1, 3, 16, 24)
    frozen = ipt_fast.freeze(model, dtype)
    expected = frozen(x)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    unpacked = torch.compile(copy.deepcopy(frozen), fullgraph=True, backend="aot_eager")
    assert torch.equal(unpacked(x), expected)
    exported = torch.export.export(frozen, (x,)).module()
    assert torch.equal(exported(x), expected)
    torch._dynamo.reset()


@needs_kernels
def test_what_is_compiled_calls_packed_operators():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(ipt_fast.freeze(merged()), fullgraph=True, backend=keep)(torch.rand(1, 3, 16, 24))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("layer_packed" in target for target in targets) == len(ipt_fast.explain(merged()))
    torch._dynamo.reset()


def test_restorer_freezes_its_model():
    model, image = micro_model(), np.random.default_rng(0).random((19, 30, 3), np.float32)
    restorer = Restorer(model, dtype="bfloat16")
    assert isinstance(restorer.model, Frozen) and restorer.model.dtype == torch.bfloat16
    frozen = ipt_fast.freeze(model, torch.bfloat16)
    again = Restorer(frozen)
    assert again.dtype == torch.bfloat16 and again.config == frozen.config
    np.testing.assert_array_equal(restorer(image), again(image))


def test_layers_of_ipt_alone():
    layer, x = EncoderLayer(16, 2).eval(), torch.rand(2, 9, 16)
    assert torch.equal(ipt_fast.freeze(layer)(x), plain(layer, x))


class ReadsWeights(torch.nn.Module):
    """A model that looks at its parts: attributes, classes, dtypes under autocast of its own."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(8, 8, 3, padding=1), ipt_fast.modules.RepLeFFN(8)])

    def forward(self, x):
        conv, ffn = self.layers
        x = x.to(conv.weight.dtype)
        for layer in self.layers:
            x = x + layer(x) if isinstance(layer, torch.nn.Conv2d) else layer(x) / ffn.channels
        with torch.autocast("cpu", torch.bfloat16):
            x = ffn(x)
        with torch.autocast("cpu", enabled=False):
            return ffn(x.float())


class ScaledParts(torch.nn.Module):
    """The parts of a layer, called by somebody else."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = x + 0.5 * self.layer.attention(self.layer.norm1(x))
        return x + 0.5 * self.layer.ffn(self.layer.norm2(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_what_they_were(dtype):
    layer = ipt_fast.create_model("ipt_v2_tiny").encoder[0][0]
    channels = layer.norm1.weight.numel()
    for model, x in ((ReadsWeights(), torch.rand(1, 8, 9, 11)), (ScaledParts(layer), torch.rand(1, channels, 20, 24))):
        model = model.eval()
        reparameterize(model)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            expected = model(x)
        assert torch.equal(ipt_fast.freeze(model, dtype)(x), expected)


def test_dtype_and_device_are_fixed():
    frozen = ipt_fast.freeze(ReadsWeights().eval())
    for name, value in (("dtype", torch.bfloat16), ("device", torch.device("meta"))):
        with pytest.raises(AttributeError):
            setattr(frozen, name, value)
