"""GRL, accelerated: attention in windows, and in shifted stripes by way of anchors."""

import copy

import pytest
import torch

import ipt_fast
from tests.acceleration.architectures import SPANDREL, build
from tests.acceleration.comparison import assert_same

# Four blocks: windows with and without a shift, stripes lying and standing, and the last two of them shifted.
LAYER = dict(depths=[4], mlp_ratio=2, stripe_shift=True, anchor_window_down_factor=4)
TINY = dict(LAYER, embed_dim=64, num_heads_window=[2], num_heads_stripe=[2], window_size=8, stripe_size=[8, 16])
BASE = dict(TINY, embed_dim=180, num_heads_window=[3], num_heads_stripe=[3], local_connection=True, window_size=16)
MODELS = {
    "tiny": (TINY, dict(upscale=2, upsampler="pixelshuffledirect", img_size=(16, 32)), (11, 27)),
    "base": (BASE, dict(stripe_size=[16, 16], img_size=(16, 32)), (15, 20)),
    "anchors by a convolution": (
        TINY,
        dict(
            anchor_proj_type="separable_conv", qkv_proj_type="separable_conv", anchor_window_down_factor=2,
            qkv_bias=False, num_heads_window=[1], num_heads_stripe=[4], conv_type="3conv", img_size=(32, 16),
        ),
        (32, 16),
    ),
}  # fmt: skip
CASES = [(name, torch.float32) for name in MODELS] + [("tiny", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_an_architecture(name, dtype):
    config, more, size = MODELS[name]
    assert_same(build(SPANDREL, "GRL", **config | more), (2, 3, *size), dtype, {"GRL attention"})


@pytest.mark.parametrize("shift", [True, False])
def test_sizes_beside_that_of_training(shift):
    """The plain model makes masks and coordinates in float32 for them, and fails in 16 bit."""
    plain = build(SPANDREL, "GRL", **TINY | dict(stripe_shift=shift, img_size=16))
    accelerated, x = copy.deepcopy(plain), torch.rand(1, 3, 32, 48)
    report = ipt_fast.accelerate(accelerated, example=x)
    assert report.whole.error <= report.whole.allowed
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="same dtype"):
            plain.bfloat16()(x.bfloat16())
        half = accelerated.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(euclidean_dist=True), "it attends by distances"),
        (dict(stripe_groups=[None, 2]), "the size of its stripes is that of the image"),
        (dict(stripe_size=[8, 20], img_size=40), "anchors of 4 cut its stripes"),
    ],
)
def test_what_does_not_fit_is_left(options, reason):
    model = build(SPANDREL, "GRL", **TINY | dict(img_size=16) | options)
    rows = ipt_fast.accelerate(model, verify=False).rows
    *_, last = (row for row in rows if row.rule != "dense convolution")  # whose stripes are shifted
    assert (last.rule, last.reason) == (None, reason)


def test_dropout_runs_the_plain_forward():
    model = build(SPANDREL, "GRL", **TINY | dict(img_size=16, attn_drop_rate=0.1)).train()
    ipt_fast.accelerate(model, example=torch.rand(1, 3, 16, 16))
    assert set(ipt_fast.explain(model).values()) == {"Dropout is active in training", None}  # None: its convolutions
    assert set(ipt_fast.explain(model.eval()).values()) == {None}
