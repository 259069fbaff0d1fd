"""Parameters and multiply-accumulates of the presets (spec 1.6), and the size of the tiny model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast

# name: (GMAC on 3x128x128, M parameters without weight maps and bias tables, M parameters), all in merged form;
# then the published GMAC and M parameters.
FIGURES = {
    "ipt_v2_small": (14.50, 11.722, 11.966, 14.61, 11.75),
    "ipt_v2_base": (44.55, 26.449, 26.764, 45.16, 26.49),
    "ipt_v2_base_plus": (62.08, 32.975, 33.390, 63.01, 33.04),
}
MAPS = ("token_weight", "top_weight", "bottom_weight", "bias_table")


def on_meta(name, **config):
    with torch.device("meta"):
        return ipt_fast.create_model(name, **config)


def parameters(model, without=()):
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(without or "\0"))


def macs(model, height=128, width=128):
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", FIGURES)
def test_parameters_and_macs(name):
    gmac, without_maps, total, published_gmac, published = FIGURES[name]
    model = on_meta(name, merged=True)
    assert round(parameters(model, MAPS) / 1e6, 3) == without_maps
    assert round(parameters(model) / 1e6, 3) == total
    assert round(macs(model) / 1e9, 2) == gmac
    assert abs(without_maps / published - 1) < 0.003
    assert 0.005 < 1 - gmac / published_gmac < 0.016


def test_reparameterized_training_form_has_the_same_figures():
    model = on_meta("ipt_v2_small")
    assert parameters(model) > 12e6
    model.reparameterize()
    assert round(parameters(model) / 1e6, 3) == 11.966
    assert round(macs(model) / 1e9, 2) == 14.50


def test_backward_operators_cost_two_forwards():
    """By operator: PyTorch's own formula for the backward of a depthwise convolution counts a dense one."""
    model = on_meta("ipt_v2_small", merged=True)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 128, 128, device="meta")).sum().backward()
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    for name in ("leffn_layer", "focal_attention_layer", "grid_attention_layer"):
        assert counts[f"ipt_fast.{name}_backward"] == 2 * counts[f"ipt_fast.{name}"] > 0


def test_tiny_is_below_a_million():
    assert parameters(on_meta("ipt_v2_tiny")) < 1e6
    assert parameters(on_meta("ipt_v2_tiny", merged=True)) < 1e6


def test_leffn_costs_what_table_7c_says(monkeypatch):
    """Its 5x5 depthwise convolutions add 2.36 GMAC and 0.74 M parameters to a plain FFN in the base model."""
    kernels = []
    layer = ipt_fast.ops.leffn_layer

    def spy(x, **arguments):
        kernels.append((arguments["depthwise_weight"].numel(), x.shape[2] * x.shape[3]))
        return layer(x, **arguments)

    monkeypatch.setattr(ipt_fast.ops, "leffn_layer", spy)
    on_meta("ipt_v2_base", merged=True)(torch.empty(1, 3, 128, 128, device="meta"))
    assert round(sum(numel * pixels for numel, pixels in kernels) / 1e9, 2) == 2.36
    assert abs(sum(numel for numel, _ in kernels) / 1e6 - 0.74) < 0.01


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ipt_v2_small", (32, (4, 6, 6, 8), 0, 32, 8)),
        ("ipt_v2_base", (48, (4, 6, 6, 8), 4, 32, 16)),
        ("ipt_v2_base_plus", (48, (6, 8, 8, 10), 6, 32, 16)),
    ],
)
def test_presets(name, expected):
    config = on_meta(name).config
    assert (config.width, config.depths, config.refinement, config.window_size, config.grid_size) == expected
    assert (config.heads, config.ffn_ratio, config.norm) == ((1, 2, 4, 8), 4, "bias_free")
    assert config.merged is False


def test_names():
    names = ipt_fast.list_models()
    assert names == list(dict.fromkeys(names)) and {*FIGURES, "ipt_v2_tiny"} <= set(names)
    names.clear()
    assert ipt_fast.list_models()
    for bad in ("ipt_v2", "", None, "IPT_V2_TINY"):
        with pytest.raises(ValueError, match="ipt_v2_tiny"):
            ipt_fast.create_model(bad)
