"""Restormer against its published module, its formulas and its published files."""

import copy
import dataclasses
import functools

import pytest
import torch

import ipt_fast
from ipt_fast.models import RestormerConfig
from tests.models.small_restormer import small_restormer
from tests.models.test_ipt_v2 import padded_by_loop
from tests.models.test_paper_figures import on_meta, parameters
from tests.ops.cases import Baseline, assert_within_rule
from tests.oracles.public import public_module

PUBLISHED = "spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch"
# What the published models differ in: without noise of cameras and screens, or with; from one view, or two.
KINDS = {
    "deraining, deblurring": {},
    "colour denoising": {"norm": "bias_free"},
    "gray denoising": {"norm": "bias_free", "in_channels": 1},
    "dual pixel": {"in_channels": 6},
    "biases": {"bias": True, "ffn_ratio": 2},
}


def published(config):
    """The published module of a config."""
    norms = {"with_bias": "WithBias", "bias_free": "BiasFree"}
    return public_module(PUBLISHED).Restormer(
        inp_channels=config.in_channels,
        out_channels=config.out_channels,
        dim=config.width,
        num_blocks=list(config.depths),
        num_refinement_blocks=config.refinement,
        heads=list(config.heads),
        ffn_expansion_factor=config.ffn_ratio,
        bias=config.bias,
        LayerNorm_type=norms[config.norm],
        dual_pixel_task=config.dual_pixel,
    )


def results(model, x, parameters, grad):
    """Output and gradients of a model with these parameters."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in {"x": x, **parameters}.items()}
    out = torch.func.functional_call(model, {name: leaves[name] for name in parameters}, (leaves["x"],))
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def assert_as_exact_as_the_published_module(model, dtype, height, width):
    """Output and gradients in a dtype by the rule for kernels; its error allows ours."""
    theirs, config = published(model.config), model.config
    theirs.load_state_dict(model.state_dict(), strict=True)
    tensors = {"x": torch.rand(2, config.in_channels, height, width), **dict(model.named_parameters())}
    tensors = {name: value.detach().to(dtype) for name, value in tensors.items()}
    grad = torch.randn(2, config.out_channels, height, width).to(dtype)

    def run(module, dtype, grad, tensors):
        values = {name: value.to(dtype) for name, value in tensors.items()}
        return results(copy.deepcopy(module).to(dtype), values.pop("x"), values, grad.to(dtype))

    base = Baseline(functools.partial(run, theirs), dtype, grad, tensors)
    truth = run(theirs, torch.float64, grad, tensors)
    assert_within_rule(run(model, dtype, grad, tensors), truth, base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_module(kind):
    torch.manual_seed(0)
    assert_as_exact_as_the_published_module(small_restormer(**KINDS[kind]), torch.float32, 16, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_published_module_in_16_bits(dtype):
    torch.manual_seed(0)
    assert_as_exact_as_the_published_module(small_restormer(), dtype, 24, 16)


def test_names_of_the_published_files():
    """By one block of each stage, from a model of its full size."""
    block = ["norm1.body.weight", "norm1.body.bias", "attn.temperature", "attn.qkv.weight", "attn.qkv_dwconv.weight"]
    block += ["attn.project_out.weight", "norm2.body.weight", "norm2.body.bias", "ffn.project_in.weight"]
    block += ["ffn.dwconv.weight", "ffn.project_out.weight"]
    depths = {"encoder_level1": 4, "encoder_level2": 6, "encoder_level3": 6, "latent": 8, "refinement": 4}
    depths |= {"decoder_level3": 6, "decoder_level2": 6, "decoder_level1": 4}
    names = {f"{stage}.{i}.{name}" for stage, depth in depths.items() for i in range(depth) for name in block}
    names |= {f"{name}.body.0.weight" for name in ("down1_2", "down2_3", "down3_4", "up4_3", "up3_2", "up2_1")}
    names |= {"patch_embed.proj.weight", "reduce_chan_level3.weight", "reduce_chan_level2.weight", "output.weight"}
    state = on_meta("restormer").state_dict()
    assert set(state) == names
    assert state["decoder_level1.0.attn.temperature"].shape == (1, 1, 1)  # as level 1, at twice its channels
    assert state["encoder_level1.0.ffn.project_out.weight"].shape == (48, 127, 1, 1)
    without = {name for name in names if not name.endswith("body.bias")}
    assert set(on_meta("restormer_denoising").state_dict()) == without
    assert set(on_meta("restormer_dual_pixel").state_dict()) == names | {"skip_conv.weight"}


def products(config, side=128):
    """Multiplications on an image of side x side by the formulas."""
    width, depths, heads = config.width, config.depths, config.heads

    def block(channels, heads):
        hidden = int(config.ffn_ratio * channels)
        attention = 3 * channels**2 + 9 * 3 * channels + 2 * channels * (channels // heads) + channels**2
        return attention + 2 * hidden * channels + 9 * 2 * hidden + hidden * channels

    total = 9 * width * config.in_channels * side**2 + 9 * 2 * width * config.out_channels * side**2
    total += (depths[0] + config.refinement) * block(2 * width, heads[0]) * side**2
    total += width * 2 * width * side**2 if config.dual_pixel else 0
    for level in range(4):
        channels, pixels = width << level, (side >> level) ** 2
        total += block(channels, heads[level]) * depths[level] * pixels * (2 if level in (1, 2) else 1)
        total += 9 * channels * (channels // 2) * pixels if level < 3 else 0  # down
        total += 9 * channels * 2 * channels * pixels if level > 0 else 0  # up
        total += 2 * channels * channels * pixels if level in (1, 2) else 0  # behind the concatenation
    return total


# name: (parameters, GMAC at 128 x 128); IPT-V2's paper gives Restormer 26.12 M (table 10) and 38.8 G.
FIGURES = {
    "restormer": (26_126_644, 38.72),
    "restormer_denoising": (26_111_668, 38.72),
    "restormer_dual_pixel": (26_132_548, 38.82),
    "restormer_local": (26_126_644, 38.72),
}


@pytest.mark.parametrize("name", FIGURES)
def test_parameters_and_macs(name):
    model = on_meta(name).eval()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(torch.empty(1, model.config.in_channels, 128, 128, device="meta"))
    macs = counter.get_total_flops() / 2
    assert (parameters(model), round(macs / 1e9, 2)) == FIGURES[name]
    assert macs == products(model.config)


# -- images and forms -------------------------------------------------------------------------------------------------


def close(value, expected):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 17), (31, 8)])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_an_image_is_padded_run_and_cropped(channels, size):
    model, x = small_restormer(in_channels=channels), torch.rand(2, channels, *size)
    assert model.config.out_channels == (1 if channels == 1 else 3)
    height, width = size
    with torch.no_grad():
        expected = model(padded_by_loop(x, 8))[..., :height, :width]
        close(model(x), expected)
        wide = x.repeat_interleave(2, 3)[..., ::2]
        close(model(wide), expected)
        close(model(x[1:]), expected[1:])
        assert model(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("kind", ["deraining, deblurring", "dual pixel"])
def test_same_function_in_every_form(kind):
    model = small_restormer(**KINDS[kind])
    x = torch.rand(2, model.config.in_channels, 17, 24)
    with torch.no_grad():
        expected = model(x)
        twin = model.to_reference()
        close(twin(x), expected)
        close(ipt_fast.freeze(model)(x), expected)
        with ipt_fast.use_backend("reference"):
            close(model(x), expected)
    assert set(ipt_fast.explain(model).values()) == {None}
    assert len(ipt_fast.explain(model)) == 2 * (2 * (1 + 2 + 1) + 1 + 1)
    assert set(ipt_fast.explain(twin).values()) == {"it is a plain twin"}


def test_a_frozen_model_computes_what_the_model_does_under_autocast():
    model, x = small_restormer(), torch.rand(1, 3, 24, 17)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            expected = model(x)
        assert torch.equal(ipt_fast.freeze(model, dtype)(x), expected)


def test_training_under_autocast():
    model, x = small_restormer().train(), torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_norm_that_is_changed_is_called():
    model, x = small_restormer(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        norm = model.latent[0].norm1
        handle = norm.body.register_forward_hook(lambda module, inputs, output: 2 * output)
        assert ipt_fast.explain(model)["latent.0.attn"] == "norm: body: it has hooks"
        doubled = model(x)
        handle.remove()
        norm.body.weight.mul_(2)
        norm.body.bias.mul_(2)
        close(doubled, model(x))
        assert (doubled - expected).abs().max() > 1e-3
        norm.body = torch.nn.Identity()
        assert ipt_fast.explain(model)["latent.0.attn"] == "norm: body: it is a Identity"
        assert model(x).isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, bad) for name in ("in_channels", "out_channels", "width") for bad in (0, 2.0, True)]
    + [("width", 9), ("depths", (1, 2, 3)), ("depths", (1, 2, 3, 0)), ("depths", 4), ("heads", (1, 2, 4, 0))]
    + [("heads", (3, 2, 4, 8)), ("refinement", -1), ("refinement", 1.0), ("ffn_ratio", 0), ("ffn_ratio", "2")]
    + [("ffn_ratio", float("inf")), ("ffn_ratio", float("nan")), ("bias", 1), ("norm", "batch"), ("norm", None)]
    + [
        ("dual_pixel", None),
        ("in_channels", 6),
        ("training_patch", 12),
        ("training_patch", 0),
        ("training_patch", 8.0),
    ],
)
def test_bad_config(field, value):
    with pytest.raises((ValueError, TypeError), match=rf"\b{field}\b"):
        RestormerConfig(**{"width": 16, field: value})


def test_config_is_the_paper_s():
    expected = dict(in_channels=3, out_channels=3, width=48, depths=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8))
    expected |= dict(ffn_ratio=2.66, bias=False, norm="with_bias", dual_pixel=False, training_patch=None)
    assert dataclasses.asdict(RestormerConfig()) == expected
    assert on_meta("restormer_denoising").config == RestormerConfig(norm="bias_free")
    assert on_meta("restormer_dual_pixel").config == RestormerConfig(in_channels=6, dual_pixel=True)
    assert on_meta("restormer_local").config == RestormerConfig(training_patch=256)
    assert on_meta("restormer", in_channels=6).config == on_meta("restormer_dual_pixel").config
    assert RestormerConfig(depths=[4, 6, 6, 8]) == RestormerConfig()


@pytest.mark.parametrize("x", [torch.rand(1, 4, 8, 8), torch.rand(3, 8, 8), torch.rand(1, 3, 8, 8).double(), None])
def test_bad_images(x):
    with pytest.raises((ValueError, TypeError), match=r"\bx\b"):
        small_restormer()(x)
