"""timm's MaxViT, accelerated: attention in blocks and grids with relative positions of every form."""

import copy

import pytest
import torch

import ipt_fast
from ipt_fast.acceleration.verify import largest_error
from tests.acceleration.comparison import assert_same, randomised
from tests.oracles.public import public_module

# Those of timm's own weights, of TensorFlow's, of networks of relative positions, and none.
OWN = dict(rel_pos_type="bias", init_values=1e-6)
TENSORFLOW = dict(rel_pos_type="bias_tf", head_first=False, norm_eps=1e-5, act_layer="gelu_tanh")
NETWORK = dict(rel_pos_type="mlp", rel_pos_dim=64, window_size=(8, 8), grid_size=(8, 8))
CONFIGS = {"own": OWN, "tensorflow": TENSORFLOW, "network": NETWORK, "none": dict(rel_pos_type="", attn_bias=False)}
CASES = [(name, torch.float32) for name in CONFIGS] + [("own", torch.bfloat16), ("tensorflow", torch.bfloat16)]


def layer(partition, config, **options):
    maxvit = public_module("timm.models.maxxvit")
    config = maxvit.MaxxVitTransformerCfg(**dict(window_size=(7, 7), grid_size=(7, 7)) | config)
    return randomised(maxvit.PartitionAttentionCl(64, partition, config, **options))


@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_layer(name, dtype, partition):
    rows, columns = CONFIGS[name].get("window_size", (7, 7))
    rule = "MaxViT attention" if name == "tensorflow" else "MaxViT block"
    assert_same(layer(partition, CONFIGS[name]), (2, 3 * rows, 2 * columns, 64), dtype, {rule})


@pytest.mark.parametrize("config", [OWN, TENSORFLOW])
def test_stochastic_depth(config):
    plain = layer("grid", config, drop_path=0.5)
    accelerated, x = copy.deepcopy(plain), torch.randn(4, 14, 7, 64)
    ipt_fast.accelerate(accelerated, example=x)
    outputs = []
    for model in (plain, accelerated):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(model.train()(x))
    assert not torch.equal(outputs[0], plain.eval()(x)) and largest_error(*outputs) < 1e-5


def test_a_model():
    maxxvit = public_module("timm.models.maxxvit")
    model = maxxvit.MaxxVit(maxxvit.model_cfgs["maxvit_pico_rw"], img_size=128).eval()
    report = ipt_fast.accelerate(model, example=torch.rand(1, 3, 128, 128))
    assert [row.rule for row in report.rows] == ["MaxViT block"] * 22 and report.whole.error <= report.whole.allowed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.attn, "scale", 1.0), "its scale is another"),
        (lambda block: setattr(block.attn.rel_pos, "window_size", (7, 6)), "its relative positions are others"),
        (lambda block: setattr(block, "partition_size", (7, 6)), "its grid has two sizes"),
        (lambda block: setattr(block, "norm1", torch.nn.Identity()), "its norm1 is no layer norm"),
        (lambda block: setattr(block, "ls1", torch.nn.Tanh()), "its ls1 is a Tanh"),
    ],
)
def test_what_does_not_fit_is_left(change, reason):
    block = layer("grid", OWN)
    change(block)
    (row,) = ipt_fast.accelerate(block, verify=False).rows
    assert (row.rule, row.reason) == (None, reason)


def test_dropout_runs_the_plain_forward():
    block = layer("block", OWN | dict(attn_drop=0.1)).train()
    ipt_fast.accelerate(block, verify=False)
    assert set(ipt_fast.explain(block).values()) == {"Dropout is active in training"}
    assert set(ipt_fast.explain(block.eval()).values()) == {None}
