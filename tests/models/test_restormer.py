"""Restormer against its published module, its formulas and its published files."""

import copy

import pytest
import torch

from tests.models.small_restormer import small_restormer
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_module(kind):
    """Its state dict, and output and gradients by the rule for kernels."""
    torch.manual_seed(0)
    model = small_restormer(**KINDS[kind])
    theirs, state = published(model.config), dict(model.named_parameters())
    theirs.load_state_dict(model.state_dict(), strict=True)
    x = torch.rand(2, model.config.in_channels, 16, 24)
    grad = torch.randn(2, model.config.out_channels, 16, 24)

    def run(dtype, grad, tensors):
        values = {name: value.detach().to(dtype) for name, value in tensors.items()}
        return results(copy.deepcopy(theirs).to(dtype), values.pop("x"), values, grad.to(dtype))

    tensors = {"x": x, **state}
    truth = run(torch.float64, grad, tensors)
    assert_within_rule(results(model, x, state, grad), truth, Baseline(run, torch.float32, grad, tensors))


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
