"""Focal attention with windows that do not go around the edges: what the border reads, and what it leaves alone."""

import pytest
import torch

import ipt_fast
from tests.ops.cases import DEVICE, build, forward_and_gradients
from tests.ops.test_parity import runnable

WINDOW = 4  # of the calls
CALLS = ["focal_channel_attention/released", "focal_attention_layer/modulated"]


def results(call, size, change=lambda tensors: None):
    """{backend: {"out": ..., argument: its gradient}} of a call on a map of this size."""
    operator, tensors, options = build(call, (2, *size), torch.float32)
    change(tensors)
    channels = next(iter(tensors.values())).shape[1] // (3 if "qkv" in tensors else 1)
    grad = torch.randn(2, channels, *size).to(DEVICE)
    found = {}
    for backend in runnable(operator, tensors, options):
        with ipt_fast.use_backend(backend):
            found[backend] = forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)
    return found


@pytest.mark.parametrize("size", [(4, 16), (16, 4), (3, 9), (2, 2)])
@pytest.mark.parametrize("call", CALLS)
def test_a_map_of_one_window_has_no_second_branch(call, size):
    def poison(tensors):
        for name in ("top_weight", "bottom_weight"):
            tensors[name].fill_(float("nan"))

    for found in results(call, size, poison).values():
        assert found["out"].isfinite().all()
        assert found["temperature"][0].abs().min() > 0 and not found["temperature"][1].any()
        assert not (found["token_weight"][1].any() or found["top_weight"].any() or found["bottom_weight"].any())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("edge", ["top", "left", "bottom", "right"])
def test_one_edge_does_not_reach_the_other(edge, value):
    """A window that went around would carry what is not finite to the opposite edge."""

    def poison(tensors):
        qkv = tensors["qkv"].transpose(2, 3) if edge in ("left", "right") else tensors["qkv"]
        qkv[:, :, slice(0, 2) if edge in ("top", "left") else slice(10, 12)] = value

    for found in results("focal_channel_attention/released", (12, 12), poison).values():
        rows = found["out"].transpose(2, 3) if edge in ("left", "right") else found["out"]
        far = rows[:, :, WINDOW:] if edge in ("top", "left") else rows[:, :, :-WINDOW]
        assert far.isfinite().all()
        assert rows.isfinite().sum() == far.numel()


@pytest.mark.parametrize("call", CALLS)
def test_the_border_gives_no_gradient_to_merge_weights(call):
    """Of a map of 5 x 5 pixels only the pixels (2, 2) to (4, 4) lie in the interior: places 2 and 3 of their windows,
    and 0."""
    for found in results(call, (5, 5)).values():
        for name in ("top_weight", "bottom_weight"):
            assert not found[name][:, 1].any() and not found[name][:, :, 1].any()
            inner = found[name][:, [0, 2, 3]][:, :, [0, 2, 3]]
            assert inner.abs().min() > 0
