"""Attention in windows: what shows on small maps only, each at the error rule on every backend that runs here."""

import pytest
import torch

from tests.ops import relatives
from tests.ops.cases import assert_within_rule, baseline, cast, exact
from tests.ops.test_parity import DTYPES, gradient_of_output, on_backend, runnable

# name: (operator, shape of the map, fields of its builder)
CASES = {
    "dense bias in cut windows": ("window_attention", (2, 7, 9), {"dense": True, "shift": (1, 3)}),
    "a table beside cut windows": ("window_attention", (1, 9, 5), {"window": (3, 5), "shift": (2, 4)}),
    "keys beyond the border": ("window_attention", (1, 5, 9), {"window": (4, 2), "keys": (8, 6)}),
    "dense bias of keys beyond the border": ("window_attention", (1, 5, 3), {"keys": (6, 8), "dense": True}),
    "reduced keys": ("window_attention", (2, 8, 6), {"reduction": 2, "shift": (2, 2)}),
    "dense bias of reduced keys": ("window_attention", (1, 6, 10), {"reduction": 2, "dense": True, "shift": (0, 2)}),
    "cosine": ("window_attention", (1, 7, 6), {"cosine": True, "shift": (3, 1), "dense": True}),
    "cosine of keys beyond the border": ("window_attention", (1, 4, 6), {"cosine": True, "keys": (6, 6)}),
    "more tokens than a chunk": ("window_attention", (1, 19, 11), {"window": (9, 10), "shift": (4, 3), "heads": 1}),
    "heads of many channels": ("window_attention", (1, 5, 6), {"depth": 35, "heads": 1}),
    "one pixel": ("window_attention", (2, 1, 1), {"shift": (2, 2)}),
    "layer of one pixel": ("window_attention_layer", (2, 1, 1), {"shift": (1, 3)}),
    "layer with a dense bias": ("window_attention_layer", (1, 9, 6), {"dense": True, "shift": (3, 2)}),
    "layer without residual": ("window_attention_layer", (2, 6, 7), {"residual": False}),
    "layer of odd heads": ("window_attention_layer", (1, 9, 10), {"heads": 3, "depth": 7, "window": (5, 3)}),
    "layer of wide windows": ("window_attention_layer", (1, 17, 20), {"window": (16, 16), "shift": (8, 8), "heads": 1}),
}
BUILDERS = {
    "window_attention": relatives._window_attention,
    "window_attention_layer": relatives._window_attention_layer,
}


def assert_rule(operator, tensors, options):
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options):
        assert_within_rule(on_backend(backend, operator, tensors, options, grad), truth, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_windows(case, dtype):
    operator, shape, fields = CASES[case]
    tensors, options = BUILDERS[operator](*shape, **fields)
    assert_rule(operator, cast(tensors, dtype), options)


@pytest.mark.parametrize("operator", BUILDERS)
@pytest.mark.parametrize("shift", [(y, x) for y in range(3) for x in range(2)])
def test_every_shift(operator, shift):
    tensors, options = BUILDERS[operator](1, 5, 7, window=(3, 2), shift=shift)
    assert_rule(operator, cast(tensors, torch.float32), options)


@pytest.mark.parametrize("name", ["q", "k"])
def test_tokens_too_short_to_be_normalised(name):
    """They are divided by 1e-12 instead of their length, on which their gradients then do not depend."""
    tensors, options = relatives._window_attention(1, 5, 6, cosine=True)
    tensors[name][..., 1:3, :] *= 1e-13
    assert_rule("window_attention", cast(tensors, torch.float32), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cosine", [False, True])
def test_all_zeros(cosine, dtype):
    tensors, options = relatives._window_attention(1, 5, 6, cosine=cosine, shift=(2, 2))
    tensors = cast({**tensors, **{name: torch.zeros_like(tensors[name]) for name in "qkv"}}, dtype)
    assert_rule("window_attention", tensors, options)


def test_views_of_one_map():
    """q, k and v along the channels of one map, in several strides, are the same as three maps."""
    tensors, options = relatives._window_attention(2, 7, 6, shift=(2, 1))
    tensors = cast(tensors, torch.float32)
    qkv, grad = torch.cat([tensors[name] for name in "qkv"], 1), torch.ones(2, 6, 7, 6)
    expected = on_backend("auto", "window_attention", tensors, options, grad)
    turned = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    for layout in (qkv.contiguous(memory_format=torch.channels_last), qkv, turned):
        views = dict(zip("qkv", layout.chunk(3, 1), strict=True))
        found = on_backend("auto", "window_attention", {**tensors, **views}, options, grad)
        assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_no_bias():
    for operator, build in BUILDERS.items():
        tensors, options = build(1, 6, 7, shift=(1, 1))
        del tensors["bias"]
        assert_rule(operator, cast(tensors, torch.float32), options)
