"""Restormer whose attention sees windows at test time (TLC), against its formula written out."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import ipt_fast
from ipt_fast.modules.transposed_attention import TransposedAttention
from tests.models.small_restormer import small_restormer
from tests.models.test_paper_figures import on_meta


def places(size, window):
    """Spec 1.9: as few windows as cover an axis, spread evenly, the last one at its end."""
    if size <= window:
        return [(0, size)]
    rows = (size + window - 1) // window
    step = (size - window + rows - 2) // (rows - 1)
    starts = [i * step for i in range(rows - 1)] + [size - window]
    return [(start, start + window) for start in starts]


def naive_attention(module, window, x):
    """MDTA in each window alone, its results averaged at each pixel."""
    qkv = module.qkv_dwconv(module.qkv(x))
    total, count = torch.zeros_like(x), torch.zeros(x.shape[2:], dtype=x.dtype)
    for top, bottom in places(x.shape[2], window):
        for left, right in places(x.shape[3], window):
            part = qkv[:, :, top:bottom, left:right]
            q, k, v = part.reshape(len(x), 3, module.num_heads, -1, (bottom - top) * (right - left)).unbind(1)
            weights = torch.einsum("bhin,bhjn->bhij", F.normalize(q, dim=3), F.normalize(k, dim=3))
            out = torch.einsum("bhij,bhjn->bhin", (weights * module.temperature).softmax(3), v)
            total[:, :, top:bottom, left:right] += out.reshape(len(x), -1, bottom - top, right - left)
            count[top:bottom, left:right] += 1
    assert count.min() >= 1
    return module.project_out(total / count)


def plain_of(model):
    """The same weights, attention of the whole image."""
    plain = small_restormer(training_patch=None)
    plain.load_state_dict(model.state_dict())
    return plain


def attentions(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TransposedAttention)]


@pytest.mark.parametrize("size", [(40, 32), (27, 62)])
def test_the_formula(size):
    model, x = small_restormer("restormer_local", training_patch=16).double(), torch.rand(2, 3, *size).double()
    naive = plain_of(model).double()
    side = {"1": 24, "2": 12, "3": 6, "t": 3, "r": 24}  # by the last letter of a stage, or the first of refinement
    for name, module in attentions(naive):
        stage = name.split(".")[0]
        window = side["r" if stage == "refinement" else stage[-1]]
        module.forward = functools.partial(naive_attention, copy.copy(module), window)
    with torch.no_grad():
        found, expected, whole = model(x), naive(x), plain_of(model).double()(x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (whole - expected).abs().max() > 1e-4 * expected.abs().max()  # windows matter


@pytest.mark.parametrize("size", [(24, 24), (17, 9)])
def test_an_image_up_to_the_window_is_one_window(size):
    model, x = small_restormer("restormer_local", training_patch=16), torch.rand(1, 3, *size)
    with torch.no_grad():
        found, expected = model(x), plain_of(model)(x)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_training_sees_the_whole_image():
    model, x = small_restormer("restormer_local", training_patch=8), torch.rand(1, 3, 40, 24)
    plain = plain_of(model)
    with torch.no_grad():
        assert torch.equal(model.train()(x), plain(x))
        windowed = model.eval()(x)
        assert not torch.equal(windowed, plain(x))
        assert torch.equal(ipt_fast.freeze(model.train())(x), windowed)
        assert torch.equal(model.to_reference().train()(x), plain.to_reference()(x))


@pytest.mark.parametrize(("fields", "level_1"), [({}, 384), ({"training_patch": 128}, 192)])
def test_windows_of_the_levels(fields, level_1):
    model = on_meta("restormer_local", **fields)
    levels = {"1": 0, "2": 1, "3": 2, "t": 3}
    for name, module in attentions(model):
        stage = name.split(".")[0]
        assert module.window_size == level_1 >> (0 if stage == "refinement" else levels[stage[-1]])
    assert {module.window_size for _, module in attentions(on_meta("restormer"))} == {None}
