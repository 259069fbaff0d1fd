"""The whole network: any image, any channel count, both forms, every dtype."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import ipt_fast
from ipt_fast.models.ipt_v2 import IPTV2Config, pad_to_multiple
from ipt_fast.modules import FocalContextSelfAttention, GlobalGridSelfAttention
from tests.models.micro import CONFIG, micro_model

SIZES = [(1, 1), (1, 7), (7, 1), (8, 8), (9, 17), (31, 33)]


def relative(value, truth):
    return ((value - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(1, 1), (3, 3), (6, 3)])
def test_any_size_and_channel_count(channels, size):
    model = micro_model(in_channels=channels[0])
    for batch in (2, 0):
        x = torch.rand(batch, channels[0], *size)
        out = model(x)
        assert out.shape == (batch, channels[1], *size) and out.dtype == torch.float32
        assert out.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_the_residual_is_the_input_or_the_mean_of_two_views(channels):
    model = micro_model(in_channels=channels)
    with torch.no_grad():
        model.output.weight.zero_()
    x = torch.rand(2, channels, 9, 10)
    expected = (x[:, :3] + x[:, 3:]) / 2 if channels == 6 else x
    torch.testing.assert_close(model(x), expected)


def padded_by_loop(x, multiple):
    """Spec 1.5, one row at a time: reflect up to size - 1 rows, then replicate the last; the same for columns."""
    for axis in (2, 3):
        rows = list(x.unbind(axis))
        size = len(rows)
        for i in range(-size % multiple):
            rows.append(rows[size - 2 - i] if i < size - 1 else rows[-1])
        x = torch.stack(rows, axis)
    return x


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 4), (8, 16), (7, 31), (9, 6)])
def test_padding(size):
    x = torch.rand(2, 3, *size)
    assert torch.equal(pad_to_multiple(x, 8), padded_by_loop(x, 8))


@pytest.mark.parametrize("size", [(1, 1), (3, 11), (9, 17)])
def test_an_image_is_padded_run_and_cropped(size):
    model, x = micro_model(), torch.rand(1, 3, *size)
    height, width = size
    expected = model(padded_by_loop(x, 8))[..., :height, :width]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def plain_forward(model, x):
    """Spec 1.1 written out, for an image whose sides are multiples of 8."""
    skips, y = [], F.conv2d(x, model.embed.weight, padding=1)
    for level in range(3):
        y = model.encoder[level](y)
        skips.append(y)
        y = F.pixel_unshuffle(F.conv2d(y, model.down[level][0].weight, padding=1), 2)
    y = model.latent(y)
    for level in (2, 1, 0):
        y = F.pixel_shuffle(F.conv2d(y, model.up[level][0].weight, padding=1), 2)
        y = torch.cat([y, skips[level]], 1)
        if level:
            y = F.conv2d(y, model.reduce[level - 1].weight)
        y = model.decoder[level](y)
    return x + F.conv2d(model.refinement(y), model.output.weight, padding=1)


@pytest.mark.parametrize("refinement", [0, 2])
def test_network_is_the_specified_composition(refinement):
    model, x = micro_model(refinement=refinement), torch.rand(2, 3, 16, 24)
    expected = plain_forward(model, x)
    assert relative(model(x), expected) < 1e-5
    with ipt_fast.use_backend("reference"):
        assert relative(model(x), expected) < 1e-5


def test_layers_alternate_and_are_as_wide_as_specified():
    model = micro_model(depths=(2, 3, 1, 2), refinement=3)
    stages = [*model.encoder, model.latent, *model.decoder, model.refinement]
    widths, heads = [8, 16, 32, 64, 16, 16, 32, 16], [1, 2, 4, 8, 2, 2, 4, 2]
    assert [len(stage) for stage in stages] == [2, 3, 1, 2, 2, 3, 1, 3]
    for stage, width, head in zip(stages, widths, heads, strict=True):
        for i, layer in enumerate(stage):
            kind = GlobalGridSelfAttention if i % 2 else FocalContextSelfAttention
            assert isinstance(layer.attention, kind)
            assert layer.attention.project.weight.shape[0] == width
            assert layer.attention.num_heads == head


@pytest.mark.parametrize("norm", ["bias_free", "with_bias"])
def test_a_layer_is_two_normed_residuals(norm):
    layer, x = micro_model(norm=norm).encoder[0][1], torch.rand(1, 8, 6, 7)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    normed = (x - (mean if norm == "with_bias" else 0)) / (variance + 1e-5).sqrt() * layer.norm1.weight[:, None, None]
    if norm == "with_bias":
        normed = normed + layer.norm1.bias[:, None, None]
    y = x + layer.attention(normed)
    torch.testing.assert_close(layer(x), y + layer.ffn(layer.norm2(y)), rtol=1e-4, atol=1e-5)
    assert all(("bias" in dict(m.named_parameters())) == (norm == "with_bias") for m in (layer.norm1, layer.norm2))


@pytest.mark.parametrize("name", ["ipt_v2_tiny", "ipt_v2_small"])
def test_reparameterize_keeps_outputs(name):
    model, x = ipt_fast.create_model(name).eval(), torch.rand(1, 3, 33, 40)
    with torch.no_grad():
        expected = model(x)
        model.reparameterize()
        out = model(x)
    assert relative(out, expected) <= 1e-5
    # The network's own part too, without the residual that dominates an untrained model's output.
    assert relative(out - x, expected - x) <= 1e-4
    assert model.config.merged is True
    assert not any(".first." in key or ".k3." in key for key in model.state_dict())
    assert model.state_dict().keys() == ipt_fast.create_model(name, merged=True).state_dict().keys()


def test_reparameterize_twice_changes_nothing():
    model, x = micro_model(), torch.rand(1, 3, 9, 9)
    model.reparameterize()
    expected, config = model(x), model.config
    model.reparameterize()
    assert torch.equal(model(x), expected) and model.config == config


def test_reparameterize_as_timm_does(tmp_path):
    """timm's reparameterize_model calls `reparameterize` of the children only, never of the model itself."""

    def visit(module):
        for child in module.children():
            if hasattr(child, "reparameterize"):
                child.reparameterize()
            visit(child)

    model, x = micro_model(), torch.rand(1, 3, 16, 16)
    expected = model(x)
    merged = copy.deepcopy(model)
    visit(merged)
    assert relative(merged(x), expected) <= 1e-5
    assert "encoder.0.0.ffn.expand.weight" in merged.state_dict()
    merged.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    assert opened.config.merged is True
    assert torch.equal(opened(x), merged(x))
    assert model.config.merged is False


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, merged):
    model, x = micro_model(merged=merged), torch.rand(1, 3, 17, 23)
    expected = model(x)
    out = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    assert relative(out.double(), expected.double()) < (1e-5 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("image", [torch.zeros(1, 3, 20, 20), torch.ones(1, 3, 20, 20), 100 * torch.rand(1, 3, 20, 20)])
def test_half_precision_stays_finite(image, dtype):
    model = ipt_fast.create_model("ipt_v2_tiny").eval().to(dtype)
    with torch.no_grad():
        assert model(image.to(dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x = micro_model(), torch.rand(2, 3, 19, 24)
    with torch.autocast("cpu", dtype=dtype):
        out = model(x)
        out.float().square().mean().backward()
    assert relative(out.float(), model(x)) < 0.05
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


def test_every_parameter_is_trained():
    model = micro_model().train()
    model(torch.rand(1, 3, 24, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_layouts_and_batches_agree():
    model, x = micro_model(), torch.rand(2, 3, 18, 21)
    expected = model(x)
    wide = torch.full((2, 4, 20, 42), float("nan"))
    wide[:, 1:, 2:, ::2] = x
    for same in (x.contiguous(memory_format=torch.channels_last), wide[:, 1:, 2:, ::2]):
        torch.testing.assert_close(model(same), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x[1:]), expected[1:], rtol=1e-5, atol=1e-6)
    before = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(3, 8, 8),
        torch.rand(1, 1, 3, 8, 8),
        torch.rand(1, 4, 8, 8),
        torch.rand(1, 3, 0, 8),
        torch.rand(1, 3, 8, 0),
        torch.rand(1, 0, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.rand(1, 3, 8, 8).double(),
        torch.rand(1, 3, 8, 8).bfloat16(),
        torch.rand(1, 3, 8, 8, device="meta"),
        torch.rand(1, 3, 8, 8).numpy(),
        None,
    ],
)
def test_bad_images(x):
    with pytest.raises((ValueError, TypeError), match=r"\bx\b"):
        micro_model()(x)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_defaults_of_the_config():
    expected = dict(in_channels=3, out_channels=3, width=48, depths=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8))
    expected |= dict(window_size=32, grid_size=16, ffn_ratio=4, inner_ratio=2, norm="bias_free", downsample_kernel=3)
    expected |= dict(merged=False, ffn="rep_leffn", order="focal_grid", scale=1, attention="paper")
    assert dataclasses.asdict(IPTV2Config()) == expected


def test_config_is_frozen_and_comparable():
    config = IPTV2Config(depths=[1, 2, 3, 4])
    assert config == IPTV2Config(depths=(1, 2, 3, 4)) and hash(config) == hash(IPTV2Config(depths=(1, 2, 3, 4)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, bad) for name in ("width", "window_size", "grid_size", "ffn_ratio", "inner_ratio") for bad in (0, -2, 4.0)]
    + [("in_channels", 0), ("in_channels", "3"), ("in_channels", 4), ("out_channels", 0), ("width", 7), ("width", True)]
    + [("depths", (1, 2, 3)), ("depths", (1, 2, 3, -1)), ("depths", 4), ("depths", "4668"), ("depths", None)]
    + [("heads", (1, 2, 4, 0)), ("heads", (3, 2, 4, 8)), ("heads", 2), ("refinement", -1), ("refinement", 1.5)]
    + [("ffn", "LeFFN"), ("ffn", None), ("order", "both"), ("order", 1), ("scale", 0), ("scale", 5), ("scale", 2.0)]
    + [("attention", "swin"), ("attention", None)]
    + [
        ("scale", True),
        ("ffn", ["ffn"]),
        ("norm", "batch"),
        ("norm", None),
        ("downsample_kernel", 2),
        ("downsample_kernel", 0),
        ("merged", 1),
    ],
)
def test_bad_config(field, value):
    with pytest.raises((ValueError, TypeError), match=rf"\b{field}\b"):
        IPTV2Config(**{"width": 16, field: value})


def test_unknown_config_field():
    with pytest.raises(ValueError, match="window_size.*; got colour"):
        ipt_fast.create_model("ipt_v2_tiny", colour=3)


def test_downsample_kernel():
    model = micro_model(downsample_kernel=1)
    assert model.down[0][0].weight.shape == (4, 8, 1, 1)
    assert model(torch.rand(1, 3, 9, 9)).shape == (1, 3, 9, 9)
    assert CONFIG["width"] == model.config.width


def test_gradients_are_bitwise_reproducible():
    model, x = micro_model().train(), torch.rand(2, 3, 21, 19)
    runs = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        runs.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert all(value.any() for value in runs[0].values())
