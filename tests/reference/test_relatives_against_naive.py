"""The reference operators of IPT-V2's relatives against the independent naive formulations, in fp64."""

import pytest
import torch

from ipt_fast import reference
from ipt_fast.reference.feed_forward_layer import FORMS
from tests.oracles import naive_relatives
from tests.reference.test_against_naive import assert_equal, random

# Divisible by some windows, by none, below every window, a single row, a single pixel.
SIZES = [(8, 6), (7, 9), (3, 5), (1, 6), (1, 1)]
HEADS, CHANNELS = 2, 6


def qkv(size, channels=CHANNELS, batch=1, reduction=1):
    """q, and k and v of a map that is smaller by ``reduction``."""
    of_keys = [each // reduction for each in size]
    return random(batch, channels, *size), *(random(batch, channels, *of_keys, seed=seed) for seed in (1, 2))


def bias_of(kind, window, keys):
    rows = (window[0] + keys[0] - 1) * (window[1] + keys[1] - 1)
    dense = (HEADS, window[0] * window[1], keys[0] * keys[1])
    return None if kind == "none" else random(*((rows, HEADS) if kind == "table" else dense), seed=3)


def check_window_attention(tensors, bias, temperature=None, **options):
    options["num_heads"] = HEADS
    actual = reference.window_attention(*tensors, bias, temperature, **options)
    assert_equal(actual, naive_relatives.window_attention(*tensors, bias, temperature, **options))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_dense_convolution(size, with_bias, activation):
    x, weight = random(2, 3, *size), random(4, 3, 3, 3, seed=1)
    bias = random(4, seed=2) if with_bias else None
    actual = reference.dense_convolution(x, weight, bias, activation=activation)
    assert_equal(actual, naive_relatives.dense_convolution(x, weight, bias, activation))


@pytest.mark.parametrize("kind", ["table", "dense", "none"])
@pytest.mark.parametrize(("window", "shift"), [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((2, 5), (1, 3)), ((4, 1), (0, 0))])
@pytest.mark.parametrize("size", SIZES)
def test_window_attention(size, window, shift, kind):
    bias = bias_of(kind, window, window)
    check_window_attention(qkv(size, batch=2), bias, window_size=window, shift=shift, scale=0.7)


@pytest.mark.parametrize("kind", ["table", "dense"])
@pytest.mark.parametrize(("window", "keys"), [((4, 4), (6, 6)), ((2, 3), (4, 5)), ((4, 2), (4, 6))])
@pytest.mark.parametrize("size", SIZES)
def test_overlapping_windows_of_keys(size, window, keys, kind):
    check_window_attention(qkv(size), bias_of(kind, window, keys), window_size=window, key_size=keys)


@pytest.mark.parametrize("kind", ["table", "dense"])
@pytest.mark.parametrize(("window", "shift"), [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((6, 2), (2, 0))])
@pytest.mark.parametrize("size", [(8, 6), (10, 2), (2, 2)])
def test_fewer_keys_than_queries(size, window, shift, kind):
    keys = window[0] // 2, window[1] // 2
    bias = bias_of(kind, window, keys)
    check_window_attention(qkv(size, reduction=2), bias, window_size=window, shift=shift)


@pytest.mark.parametrize("keys", [None, (4, 4)])
@pytest.mark.parametrize("size", SIZES)
def test_cosine_attention(size, keys):
    window, shift = (2, 2), (0, 0) if keys else (1, 1)
    temperature = torch.linspace(0.5, 9.0, HEADS, dtype=torch.float64)
    bias = bias_of("table", window, keys or window)
    check_window_attention(qkv(size), bias, temperature, window_size=window, shift=shift, key_size=keys)


def test_shifted_windows_are_those_of_swin():
    """A cyclic shift, square windows and -100 between the regions it put together (Swin, figure 4), written out."""
    (height, width), window, shift = (8, 12), 4, 2
    q, k, v = qkv((height, width))
    table = random((2 * window - 1) ** 2, HEADS, seed=3)

    def region(at, size):
        return 0 if at < size - window else 1 if at < size - shift else 2

    rolled = [torch.roll(t, (-shift, -shift), (2, 3)).double() for t in (q, k, v)]
    out, d = torch.zeros_like(q), CHANNELS // HEADS
    places = [(a, b) for a in range(window) for b in range(window)]
    for top in range(0, height, window):
        for left in range(0, width, window):
            for head in range(HEADS):
                rows = [
                    torch.stack([t[0, head * d : (head + 1) * d, top + a, left + b] for a, b in places]) for t in rolled
                ]
                scores = rows[0] @ rows[1].T / d**0.5
                for i, (a, b) in enumerate(places):
                    for j, (c, e) in enumerate(places):
                        scores[i, j] += table[(a - c + window - 1) * (2 * window - 1) + b - e + window - 1, head]
                        here = region(top + a, height), region(left + b, width)
                        scores[i, j] -= 0 if here == (region(top + c, height), region(left + e, width)) else 100
                for (a, b), row in zip(places, scores.softmax(-1) @ rows[2], strict=True):
                    out[0, head * d : (head + 1) * d, top + a, left + b] = row
    expected = torch.roll(out, (shift, shift), (2, 3))
    actual = reference.window_attention(q, k, v, table, num_heads=HEADS, window_size=window, shift=shift)
    assert_equal(actual, expected.numpy())


@pytest.mark.parametrize(
    "groups",
    [
        {"window_size": (4, 2)},
        {"window_size": (3, 8)},
        {"dilation": 2},
        {"dilation": 4},
        {"window_size": (4, 4), "overlapping": True},
        {"window_size": (5, 3), "overlapping": True},
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_groups_of_channel_attention(size, groups):
    tensors = *qkv(size, batch=2), torch.linspace(0.5, 3.0, HEADS, dtype=torch.float64)
    actual = reference.channel_attention(*tensors, num_heads=HEADS, **groups)
    assert_equal(actual, naive_relatives.channel_attention(*tensors, num_heads=HEADS, **groups))


def layer(size, batch, extras, outputs):
    """x, the norm's parameters, biases of so many outputs and a gate, of each image if ``extras`` is "images"."""
    of_norm = (batch, CHANNELS) if extras == "images" else (CHANNELS,)
    norm = 1 + 0.3 * random(*of_norm, seed=1), random(*of_norm, seed=2) if extras else None
    biases = {f"{name}_bias": random(count, seed=9) for name, count in outputs.items()}
    options = {"eps": 1e-3, "centered": bool(extras)}
    others = {**biases, "gate": random(*of_norm, seed=10)} if extras else {}
    return random(batch, CHANNELS, *size), norm, options | others


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("extras", ["", "channels", "images"])
def test_window_attention_layer(extras, residual):
    x, norm, others = layer((5, 6), 2, extras, {"qkv": 3 * CHANNELS, "project": CHANNELS})
    weights = random(3 * CHANNELS, CHANNELS, 1, 1, seed=4), random(CHANNELS, CHANNELS, 1, 1, seed=5)
    bias = bias_of("dense" if extras else "table", (4, 2), (4, 2))
    options = {"num_heads": HEADS, "window_size": (4, 2), "shift": (2, 1), "residual": residual, **others}
    actual = reference.window_attention_layer(x, *norm, *weights, bias, **options)
    assert_equal(actual, naive_relatives.window_attention_layer(x, *norm, *weights, bias, **options))


@pytest.mark.parametrize("groups", [{}, {"window_size": (4, 2)}, {"window_size": (3, 3), "overlapping": True}])
@pytest.mark.parametrize("convolved", [True, False])
@pytest.mark.parametrize("extras", ["", "channels", "images"])
def test_channel_attention_layer(extras, convolved, groups):
    outputs = {"qkv": 3 * CHANNELS, **({"depthwise": 3 * CHANNELS} if convolved else {}), "project": CHANNELS}
    x, norm, others = layer((5, 4), 2, extras, outputs)
    weights = (
        random(3 * CHANNELS, CHANNELS, 1, 1, seed=4),
        random(3 * CHANNELS, 1, 3, 3, seed=5) if convolved else None,
        random(CHANNELS, CHANNELS, 1, 1, seed=6),
    )
    temperature = torch.linspace(0.5, 3.0, HEADS, dtype=torch.float64)
    options = {"num_heads": HEADS, "residual": not extras, **groups, **others}
    actual = reference.channel_attention_layer(x, *norm, *weights, temperature, **options)
    assert_equal(actual, naive_relatives.channel_attention_layer(x, *norm, *weights, temperature, **options))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("extras", ["", "images"])
@pytest.mark.parametrize("form", FORMS)
def test_feed_forward_layer(form, extras, kernel):
    hidden = 10
    projected = hidden // 2 if form in ("gdfn", "sgfn") else hidden
    convolved = projected if form == "sgfn" else hidden
    outputs = {"expand": hidden, **({} if form == "mlp" else {"depthwise": convolved}), "project": CHANNELS}
    x, norm, others = layer((4, 3), 2, extras, outputs)
    weights = (
        random(hidden, CHANNELS, 1, 1, seed=4),
        None if form == "mlp" else random(convolved, 1, kernel, kernel, seed=5),
        random(CHANNELS, projected, 1, 1, seed=6),
    )
    inner = {"inner_weight": random(projected, seed=7), "inner_bias": random(projected, seed=8), "inner_eps": 1e-2}
    options = {"form": form, **(inner if form == "sgfn" else {}), **others}
    actual = reference.feed_forward_layer(x, *norm, *weights, **options)
    assert_equal(actual, naive_relatives.feed_forward_layer(x, *norm, *weights, **options))


@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("extras", ["", "channels", "images"])
@pytest.mark.parametrize("normed", [True, False])
def test_depthwise_layer(normed, extras, kernel, activation):
    x, norm, others = layer((4, 3), 2, extras, {"depthwise": CHANNELS})
    names = {"norm_weight": norm[0], "norm_bias": norm[1]} if normed else {}
    options = {**names, "activation": activation, **{n: others[n] for n in ("eps", "centered") if n in others}}
    arguments = x, random(CHANNELS, 1, kernel, kernel, seed=5), others.get("depthwise_bias")
    actual = reference.depthwise_layer(*arguments, **options)
    assert_equal(actual, naive_relatives.depthwise_layer(*arguments, **options))


@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("extras", ["", "channels", "images"])
@pytest.mark.parametrize("normed", [True, False])
def test_pointwise_layer(normed, extras, residual, activation):
    x, norm, others = layer((4, 3), 2, extras, {"project": 5})
    names = {"norm_weight": norm[0], "norm_bias": norm[1]} if normed else {}
    options = {**names, "activation": activation, **{n: others[n] for n in ("eps", "centered") if n in others}}
    added = random(2, 5, 4, 3, seed=6) if residual else None
    arguments = x, random(5, CHANNELS, 1, 1, seed=5), others.get("project_bias"), added
    actual = reference.pointwise_layer(*arguments, **options)
    assert_equal(actual, naive_relatives.pointwise_layer(*arguments, **options))


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("shape", [(CHANNELS,), (2, CHANNELS)])
def test_gated_projection(shape, extras):
    maps = [random(2, CHANNELS, 4, 3, seed=seed) for seed in (1, 2)]
    gates = random(*shape, seed=3), random(2, 1, 4, 3, seed=4)
    others = (random(5, seed=6), random(2, 5, 4, 3, seed=7)) if extras else ()
    arguments = *maps, *gates, random(5, CHANNELS, 1, 1, seed=5), *others
    assert_equal(reference.gated_projection(*arguments), naive_relatives.gated_projection(*arguments))
