"""Calls of the operators of IPT-V2's relatives: attention in windows, of channels, and feed-forward networks."""

import torch

from tests.ops.values import biases, norm, norm_options, pointwise, random


def channel_attention(batch, height, width, *, heads=2, depth=3, window=None, **groups):
    tensors = {name: random(batch, heads * depth, height, width) for name in "qkv"}
    tensors["temperature"] = 0.5 + torch.rand(heads, dtype=torch.float64)
    return tensors, {"num_heads": heads, "window_size": window, **groups}


def _bias(heads, window, keys, dense):
    rows = (window[0] + keys[0] - 1) * (window[1] + keys[1] - 1)
    return random(heads, window[0] * window[1], keys[0] * keys[1]) if dense else random(rows, heads)


def _window_attention(
    batch, height, width, *, heads=2, depth=3, window=(4, 4), keys=None, shift=(0, 0), dense=False, cosine=False,
    reduction=1,
):  # fmt: skip
    height, width = (-(-size // reduction) * reduction for size in (height, width))
    tensors = {"q": random(batch, heads * depth, height, width)}
    tensors |= {name: random(batch, heads * depth, height // reduction, width // reduction) for name in "kv"}
    tensors["bias"] = _bias(heads, window, keys or [size // reduction for size in window], dense)
    if cosine:
        tensors["temperature"] = 1 + 9 * torch.rand(heads, dtype=torch.float64)
    return tensors, {"num_heads": heads, "window_size": window, "key_size": keys, "shift": shift}


def _layer(batch, height, width, channels, bias):
    return {
        "x": random(batch, channels, height, width),
        **norm(channels, bias),
        "qkv_weight": pointwise(3 * channels, channels),
        "project_weight": pointwise(channels, channels),
    }


def _extras(channels, outputs):
    return {**biases(outputs), "gate": 0.5 * random(channels)}


def _window_attention_layer(
    batch, height, width, *, heads=2, depth=3, window=(4, 4), shift=(0, 0), dense=False, bias=True, residual=True,
):  # fmt: skip
    channels = heads * depth
    tensors = _layer(batch, height, width, channels, bias) | {"bias": _bias(heads, window, window, dense)}
    if bias:
        tensors |= _extras(channels, {"qkv": 3 * channels, "project": channels})
    options = {"num_heads": heads, "window_size": window, "shift": shift, "residual": residual}
    return tensors, options | norm_options(bias)


def _channel_attention_layer(batch, height, width, *, heads=2, depth=3, bias=True, depthwise=True, **groups):
    channels = heads * depth
    tensors = _layer(batch, height, width, channels, bias)
    tensors["depthwise_weight"] = random(3 * channels, 1, 3, 3) / 3
    tensors["temperature"] = 0.5 + torch.rand(heads, dtype=torch.float64)
    if bias:
        tensors |= _extras(channels, {"qkv": 3 * channels, "depthwise": 3 * channels, "project": channels})
    options = {"num_heads": heads, **groups, **norm_options(bias)}
    if not depthwise:
        options["depthwise_weight"] = None
        tensors = {name: value for name, value in tensors.items() if not name.startswith("depthwise")}
    return tensors, options


def _depthwise_layer(
    batch, height, width, *, channels=7, kernel=3, bias=True, normed=True, each_image=False, activation="gelu"
):
    tensors = {"x": random(batch, channels, height, width), "weight": random(channels, 1, kernel, kernel) / kernel}
    of_norm = (batch, channels) if each_image else (channels,)
    if normed:
        tensors["norm_weight"] = 1 + 0.3 * random(*of_norm)
    if bias:
        tensors |= {"bias": random(channels)} | ({"norm_bias": random(*of_norm)} if normed else {})
    return tensors, {"activation": activation, **norm_options(bias)}


def _gated_projection(batch, height, width, *, channels=7, outputs=5, extras=True, each_image=False):
    tensors = {name: random(batch, channels, height, width) for name in ("x", "other")}
    tensors["channel_gate"] = torch.rand(*([batch] if each_image else []), channels, dtype=torch.float64)
    tensors["pixel_gate"] = torch.rand(batch, 1, height, width, dtype=torch.float64)
    tensors["weight"] = pointwise(outputs, channels)
    if extras:
        tensors |= {"bias": random(outputs), "residual": random(batch, outputs, height, width)}
    return tensors, {}


def _pointwise_layer(
    batch, height, width, *, channels=7, outputs=5, extras=True, normed=True, each_image=False, activation="gelu"
):  # fmt: skip
    tensors = {"x": random(batch, channels, height, width), "weight": pointwise(outputs, channels)}
    of_norm = (batch, channels) if each_image else (channels,)
    if extras:
        tensors |= {"bias": random(outputs), "residual": random(batch, outputs, height, width)}
    if normed:
        tensors |= {"norm_weight": 1 + 0.3 * random(*of_norm)} | ({"norm_bias": random(*of_norm)} if extras else {})
    return tensors, {"activation": activation, **norm_options(extras)}


HALVES = ("gdfn", "sgfn")


def _feed_forward_layer(batch, height, width, *, form, channels=5, hidden=14, kernel=3, bias=True):
    projected = hidden // 2 if form in HALVES else hidden
    convolved = projected if form == "sgfn" else hidden
    tensors = {
        "x": random(batch, channels, height, width),
        **norm(channels, bias),
        "expand_weight": pointwise(hidden, channels),
        "depthwise_weight": random(convolved, 1, kernel, kernel) / kernel,
        "project_weight": pointwise(channels, projected),
    }
    if bias:
        tensors |= _extras(channels, {"expand": hidden, "depthwise": convolved, "project": channels})
    if form == "sgfn":
        tensors |= {"inner_weight": 1 + 0.3 * random(projected), "inner_bias": random(projected)}
    options = {"form": form, **norm_options(bias)}
    if form == "mlp":
        options["depthwise_weight"] = None
        tensors = {name: value for name, value in tensors.items() if not name.startswith("depthwise")}
    return tensors, options


def _dense_convolution(batch, height, width, *, channels=5, out=7, bias=True):
    tensors = {
        "x": random(batch, channels, height, width),
        "weight": random(out, channels, 3, 3) * (9 * channels) ** -0.5,
    }
    return tensors | ({"bias": random(out)} if bias else {}), {"activation": "gelu" if bias else "none"}


_SHIFTED, _OVERLAPPING = {"window": (4, 2), "shift": (2, 1)}, {"keys": (6, 6), "dense": True}
# The same form as CALLS of cases.py. Options that are not here are tested on small maps (test_relatives.py).
CALLS = {
    "channel_attention/dilated": ("channel_attention", channel_attention, {"dilation": 3}),
    "channel_attention/overlapping": ("channel_attention", channel_attention, {"window": (5, 4), "overlapping": True}),
    "window_attention": ("window_attention", _window_attention, _SHIFTED),
    "window_attention/overlapping": ("window_attention", _window_attention, _OVERLAPPING),
    "window_attention/cosine": ("window_attention", _window_attention, {"cosine": True, "shift": (2, 2)}),
    "window_attention_layer": ("window_attention_layer", _window_attention_layer, _SHIFTED),
    "window_attention_layer/bias_free": ("window_attention_layer", _window_attention_layer, {"bias": False}),
    "channel_attention_layer": ("channel_attention_layer", _channel_attention_layer, {}),
    "channel_attention_layer/bias_free": ("channel_attention_layer", _channel_attention_layer, {"bias": False}),
    "channel_attention_layer/windows": (
        "channel_attention_layer", _channel_attention_layer, {"window_size": (4, 3), "depthwise": False},
    ),
    "depthwise_layer": ("depthwise_layer", _depthwise_layer, {}),
    "depthwise_layer/bias_free": ("depthwise_layer", _depthwise_layer, {"bias": False}),
    "depthwise_layer/no_norm": ("depthwise_layer", _depthwise_layer, {"normed": False, "bias": False, "channels": 33}),
    "gated_projection": ("gated_projection", _gated_projection, {}),
    "gated_projection/each_image": ("gated_projection", _gated_projection, {"extras": False, "each_image": True}),
    "pointwise_layer": ("pointwise_layer", _pointwise_layer, {}),
    "pointwise_layer/bias_free": ("pointwise_layer", _pointwise_layer, {"extras": False, "activation": "none"}),
    "pointwise_layer/no_norm": (
        "pointwise_layer", _pointwise_layer, {"normed": False, "channels": 33, "outputs": 3, "activation": "none"},
    ),
    "dense_convolution": ("dense_convolution", _dense_convolution, {}),
    "dense_convolution/plain": ("dense_convolution", _dense_convolution, {"bias": False, "channels": 18, "out": 3}),
    "feed_forward_layer": ("feed_forward_layer", _feed_forward_layer, {"form": "mlp"}),
    "feed_forward_layer/gdfn": ("feed_forward_layer", _feed_forward_layer, {"form": "gdfn", "bias": False}),
    "feed_forward_layer/sgfn": ("feed_forward_layer", _feed_forward_layer, {"form": "sgfn"}),
}  # fmt: skip
