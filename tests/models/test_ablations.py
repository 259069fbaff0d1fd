"""Feed-forward networks and orders of the paper's tables 7 to 9: sizes, formulas, and every form of a model."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.export import export

import ipt_fast
from ipt_fast.models import open_model
from ipt_fast.models.ipt_v2 import FEED_FORWARDS, ORDERS, FeedForwardLayer
from ipt_fast.modules.attention import FocalContextSelfAttention, ParallelAttention
from ipt_fast.modules.baseline_feed_forward import FeedForward, GatedFeedForward
from tests.models.micro import micro_model
from tests.models.test_paper_figures import MAPS, macs, on_meta, parameters

BASE, SMALL = "ipt_v2_base", "ipt_v2_small"
# (model, what differs in its config): published GMAC and M parameters, our GMAC, our M parameters without maps and
# tables. Of rows that fit, the count is 0.8 to 1.6 % lower and the parameters differ by less than 0.35 %.
ROWS = {
    (BASE, ()): (45.16, 26.49, 44.55, 26.449),
    (BASE, (("ffn", "ffn"),)): (42.80, 25.75, 42.19, 25.700),
    (BASE, (("ffn", "leffn"),)): (45.16, 26.49, 44.55, 26.449),
    (BASE, (("ffn", "gdfn"),)): (43.90, 26.06, 43.23, 26.011),
    (BASE, (("order", "grid_focal"),)): (45.16, 26.49, 44.55, 26.449),
    (SMALL, (("grid_size", 16), ("window_size", 16))): (16.85, 11.76, 16.71, 11.722),
    (SMALL, (("grid_size", 16), ("window_size", 32))): (16.85, 11.76, 16.71, 11.722),
    (SMALL, (("grid_size", 16), ("window_size", 64))): (16.85, 11.76, 16.71, 11.722),
    (SMALL, (("grid_size", 8), ("window_size", 16))): (14.61, 11.76, 14.50, 11.722),
    (SMALL, (("grid_size", 8), ("window_size", 32))): (14.61, 11.76, 14.50, 11.722),
    (SMALL, (("grid_size", 8), ("window_size", 64))): (14.61, 11.76, 14.50, 11.722),
    (SMALL, (("grid_size", 4), ("window_size", 16))): (14.05, 11.76, 13.94, 11.722),
    (SMALL, (("grid_size", 4), ("window_size", 32))): (14.05, 11.76, 13.94, 11.722),
    (SMALL, (("grid_size", 4), ("window_size", 64))): (14.05, 11.76, 13.94, 11.722),
}
# Rows of the tables that this reading does not reproduce, told in docs/ipt_v2.md with these numbers.
MISFITS = {
    (BASE, (("order", "focal"),)): (42.17, 26.64, 41.09, 26.550),
    (BASE, (("order", "grid"),)): (45.36, 25.87, 48.00, 26.348),
    (BASE, (("order", "parallel"),)): (47.72, 29.81, 47.12, 28.261),
    (BASE, (("ffn", "gdfn"), ("order", "grid"))): (42.86, 26.01, 46.69, 25.909),
}


def counts(name, fields):
    model = on_meta(name, merged=True, **dict(fields))
    for module in model.modules():
        if isinstance(module, FeedForward):  # as one operator, it would count the products with weights of 1
            module.plain = True
    return macs(model) / 1e9, parameters(model, MAPS) / 1e6


@pytest.mark.parametrize("row", ROWS)
def test_sizes_of_the_tables(row):
    published_gmac, published, expected_gmac, expected = ROWS[row]
    gmac, millions = counts(*row)
    assert (round(gmac, 2), round(millions, 3)) == (expected_gmac, expected)
    assert 0.0075 < 1 - gmac / published_gmac < 0.016
    assert abs(millions / published - 1) < 0.0035


@pytest.mark.parametrize("row", MISFITS)
def test_sizes_that_the_tables_have_otherwise(row):
    gmac, millions = counts(*row)
    assert (round(gmac, 2), round(millions, 3)) == MISFITS[row][2:]


def test_differences_between_rows():
    """What a switch costs, against the same differences in the tables: GMAC within 0.06, parameters within 0.02 M."""
    base, published = counts(BASE, ()), (45.16, 26.49)
    for row in ROWS:
        if row[0] == BASE:
            for value, own, theirs, paper, tolerance in zip(
                counts(*row), base, ROWS[row][:2], published, (0.06, 0.02), strict=True
            ):
                assert abs((value - own) - (theirs - paper)) < tolerance, row
    grid = {size: counts(SMALL, (("grid_size", size),))[0] for size in (16, 8, 4)}
    assert abs((grid[16] - grid[8]) - (16.85 - 14.61)) < 0.06 and abs((grid[8] - grid[4]) - (14.61 - 14.05)) < 0.06
    parallel = counts(BASE, (("order", "parallel"),))
    assert abs((parallel[0] - base[0]) - (47.72 - 45.16)) < 0.06
    assert round(26.49 + parallel[1] - base[1], 1) == 28.3  # the table has 29.81


# -- formulas -------------------------------------------------------------------------------------------------------


def test_layers_of_each_order():
    for order, kinds in ORDERS.items():
        model = micro_model(depths=(2, 3, 1, 2), refinement=2, order=order)
        classes = {
            "focal": ipt_fast.modules.FocalContextSelfAttention,
            "grid": ipt_fast.modules.GlobalGridSelfAttention,
            "both": ParallelAttention,
        }
        for stage in (*model.encoder, model.latent, *model.decoder, model.refinement):
            for i, layer in enumerate(stage):
                if kinds[i % 2] == "none":
                    assert type(layer) is FeedForwardLayer
                else:
                    assert type(layer.attention) is classes[kinds[i % 2]]


def test_two_layers_side_by_side():
    stage, x = micro_model(order="parallel").encoder[0], torch.rand(2, 8, 9, 10)
    first, second = stage
    normed = first.norm1(x)
    both = torch.cat([first.attention.focal(normed), first.attention.grid(normed)], 1)
    y = x + F.conv2d(both, first.attention.merge.weight)
    y = y + first.ffn(first.norm2(y))
    torch.testing.assert_close(stage(x), y + second.ffn(second.norm2(y)), rtol=1e-4, atol=1e-5)
    assert first.attention.merge.weight.shape == (8, 16, 1, 1)


def test_feed_forward_networks():
    x = torch.rand(2, 6, 9, 7)
    plain = FeedForward(6, 3)
    hidden = torch.einsum("mc,bchw->bmhw", plain.expand.weight[..., 0, 0], x)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(plain(x), torch.einsum("cm,bmhw->bchw", plain.project.weight[..., 0, 0], hidden))

    gated = GatedFeedForward(6)
    assert gated.project_out.weight.shape == (6, int(2.66 * 6), 1, 1) == (6, 15, 1, 1)
    a, b = F.conv2d(F.conv2d(x, gated.project_in.weight), gated.dwconv.weight, padding=1, groups=30).split(15, 1)
    torch.testing.assert_close(gated(x), F.conv2d(F.gelu(a) * b, gated.project_out.weight))
    assert GatedFeedForward(48).project_out.weight.shape[1] == 127

    for module in (plain, gated):
        with pytest.raises(ValueError, match=r"x must be \(B, 6, H, W\)"):
            module(torch.rand(1, 5, 4, 4))


# -- every form -------------------------------------------------------------------------------------------------------

VARIANTS = [{"ffn": ffn} for ffn in FEED_FORWARDS[1:]] + [{"order": order} for order in list(ORDERS)[1:]]
VARIANTS += [{"ffn": "gdfn", "order": "grid"}, {"ffn": "ffn", "order": "parallel"}]


def variant(fields):
    return micro_model(depths=(2, 1, 0, 1), **fields)


def close(value, expected):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_training(fields):
    model, x = variant(fields).train(), torch.rand(2, 3, 24, 24)
    target = x + 0.1 * torch.rand_like(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = F.mse_loss(model(x), target)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    optimizer.step()
    assert F.mse_loss(model(x), target) < loss


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_fused_layers(fields):
    """Everything but attentions side by side is one operator a layer, and these say why they are not."""
    model = variant(fields)
    for part, reason in ipt_fast.explain(model).items():
        module = model.get_submodule(part)
        if isinstance(module, ParallelAttention):
            assert reason == "there is no operator for LayerNorm2d and ParallelAttention"
        else:
            assert reason is None, part
    layers = sum(len(stage) for stage in (*model.encoder, model.latent, *model.decoder))
    without_attention = sum(isinstance(module, FeedForwardLayer) for module in model.modules())
    assert len(ipt_fast.explain(model)) == 2 * layers - without_attention


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_same_function_in_every_form(fields, tmp_path):
    model, x = variant(fields), torch.rand(2, 3, 17, 24)
    with torch.no_grad():
        expected = model(x)
        assert (expected - x).abs().max() > 0.01
        assert model(x[:0]).shape == (0, 3, 17, 24)
        close(model.to_reference()(x), expected)
        close(ipt_fast.freeze(model)(x), expected)
        with ipt_fast.use_backend("reference"):
            close(model(x), expected)
        close(export(model.to_reference(), (x,)).module()(x), expected)

        model.save_pretrained(tmp_path)
        again = ipt_fast.models.open_model(tmp_path)
        assert again.config == model.config and torch.equal(again(x), expected)

        merged = copy.deepcopy(model)
        merged.reparameterize()
        close(merged(x), expected)
        assert merged.config.merged and merged.config.order == model.config.order
        merged.save_pretrained(tmp_path)
        close(ipt_fast.models.open_model(tmp_path)(x), expected)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_half_precision(fields):
    model, x = variant(fields), torch.rand(1, 3, 16, 19)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        out.float().square().mean().backward()
    for value in (out, copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16())):
        assert (value.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_plain_leffn_takes_the_weights_of_a_merged_one():
    model, plain = micro_model(), micro_model(ffn="leffn")
    assert plain.config.merged is False
    assert not [name for name in plain.state_dict() if ".first." in name or ".k5." in name]
    ipt_fast.models.load_state(plain, model.state_dict(), "memory")
    x = torch.rand(1, 3, 12, 12)
    close(plain(x), model(x))


def test_config_files_from_before_these_fields(tmp_path):
    model, x = micro_model(), torch.rand(1, 3, 9, 9)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in ("ffn", "order", "scale"):
        del config[name]
    file.write_text(json.dumps(config))
    again = ipt_fast.models.open_model(tmp_path)
    assert again.config == model.config and torch.equal(again(x), model(x))


@pytest.mark.parametrize("change", [{"ffn": "gdfn"}, {"order": "grid_focal"}, {"scale": 2}])
def test_shipped_weights_are_of_the_paper_s_model(change):
    with pytest.raises(ValueError, match="as in the weights that ship for ipt_v2_tiny; got"):
        ipt_fast.create_model("ipt_v2_tiny", pretrained=True, **change)


@pytest.mark.parametrize("order", ["focal_grid", "parallel"])
def test_the_released_reading_of_fcsa(order, tmp_path):
    model = micro_model(attention="released", order=order)
    x = torch.rand(1, 3, 19, 24)
    focal = [m for m in model.modules() if isinstance(m, FocalContextSelfAttention)]
    assert len(focal) > 1 and {m.attention for m in focal} == {"released"}
    with torch.no_grad():
        expected = model(x)
        assert not torch.allclose(expected, micro_model(order=order)(x))
        torch.testing.assert_close(model.to_reference()(x), expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(open_model(tmp_path / "model")(x), expected)
        torch.testing.assert_close(ipt_fast.freeze(model)(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention must be one of paper, released; got 'swin'"):
        micro_model(attention="swin")
    with pytest.raises(ValueError, match="window_size must be even where attention is released; got 5"):
        micro_model(attention="released", window_size=5)
