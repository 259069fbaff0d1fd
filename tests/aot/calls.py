"""The operators' calls that are compiled ahead of time: the widths, heads and dtypes of the models."""

import re

import torch

import ipt_fast.kernels
from ipt_fast.kernels import _launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTHS = (32, 48, 64, 96, 192, 384)  # of IPT-V2 small and base, from the first level to the latent one
TOKEN_WIDTHS = (144, 576)  # of ipt_tiny and ipt
RESTORMER = ((48, 1, 127), (96, 2, 255), (192, 4, 510), (384, 8, 1021))  # widths, heads, hidden channels of a gate
# Of SwinIR and its kin: channels, heads, window, window of keys, how much smaller the map of keys is.
WINDOWS = (
    (60, 6, (8, 8), (8, 8), 1),
    (180, 6, (8, 8), (8, 8), 1),
    (180, 6, (8, 32), (8, 32), 1),
    (180, 6, (16, 16), (24, 24), 1),
    (180, 6, (24, 24), (12, 12), 2),
)
INTERACTIONS = (60, 180)  # channels of DAT-light and DAT
MODULATED = (32, 384)  # widths at which layers have a norm and a gate of each image, and biases, too


def _image(channels, dtype, size=64, batch=1):
    shape = (batch, channels, size, size)
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


def _tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _modulation(*outputs):
    """A norm of each image, the biases of projections with so many outputs, and a gate of each image."""
    return [_tensor(2, outputs[-1]) for _ in range(2)], [*map(_tensor, outputs), _tensor(2, outputs[-1])]


def calls():
    """{name: (operator, arguments)}; every operator is called forward and backward."""
    found = {}
    for label, dtype in DTYPES.items():
        for width in WIDTHS:
            x, norm = _image(width, dtype), _tensor(width)
            found[f"layer_norm_2d {width} {label}"] = "layer_norm_2d", (x, norm, norm, 1e-5, True)
            found[f"layer_norm_2d bias-free {width} {label}"] = "layer_norm_2d", (x, norm, None, 1e-5, False)
            found |= _feed_forward(width, x, norm, label)
        for width in TOKEN_WIDTHS:
            tokens, norm = _tensor(64, width, dtype=dtype), _tensor(width, dtype=dtype)
            call = f"add_layer_norm {width} {label}"
            found[call] = "add_layer_norm", (tokens, tokens, norm, norm, 1e-5, dtype)
            found[f"{call} first"] = "add_layer_norm", (tokens, None, norm, norm, 1e-5, dtype)
            stream, norm = _tensor(64, width), _tensor(width)
            found[f"{call} autocast"] = "add_layer_norm", (stream, tokens, norm, norm, 1e-5, dtype)
        for head, grid in ((32, 8), (48, 16)):
            for heads in (1, 2, 4, 8):
                found |= _grid_attention(head * heads, heads, grid, dtype, f"{head * heads} {grid}x{grid} {label}")
            found[f"grid_attention no bias {head} {grid}x{grid} {label}"] = (
                "grid_attention", (_image(3 * head, dtype), None, 1, grid),
            )  # fmt: skip
        for head in (32, 48):
            for heads in (1, 2, 4, 8):
                found |= _channel_attention(head * heads, heads, dtype, f"{head * heads} {label}")
        for channels, heads, window, keys, reduction in WINDOWS:
            found |= _window_attention(channels, heads, window, keys, reduction, dtype, label)
        for width in INTERACTIONS:
            found |= _depthwise_layer(width, dtype, label)
            found |= _gated_projection(width, dtype, label)
            found |= _pointwise_layer(width, dtype, label)
        for width, heads, hidden in RESTORMER:
            found |= _channel_attention_layer(width, heads, dtype, f"{width} {label}")
            found |= _feed_forward_layer("gdfn", width, 2 * hidden, 3, dtype, label)
        for form, width, hidden, kernel in (
            ("mlp", 60, 120, 1), ("mlp", 180, 360, 1), ("sgfn", 180, 720, 3), ("leff", 32, 128, 3), ("mix", 64, 256, 3),
            ("conv_ffn", 60, 120, 5),
        ):  # fmt: skip
            found |= _feed_forward_layer(form, width, hidden, kernel, dtype, label)
    return {name: call for name, call in found.items() if "modulated" not in name or int(name.split()[2]) in MODULATED}


def _window_attention(width, heads, window, keys, reduction, dtype, label):
    q, k, v = (_image(width, dtype, size) for size in (96, 96 // reduction, 96 // reduction))
    table = _tensor((window[0] + keys[0] - 1) * (window[1] + keys[1] - 1), heads)
    dense = _tensor(heads, window[0] * window[1], keys[0] * keys[1])
    shift = [size // 2 if window == keys else 0 for size in window]
    name = f"{width} {window[0]}x{window[1]} {keys[0]}x{keys[1]} {label}"
    rest = heads, window, keys, shift
    found = {f"window_attention {name}": ("window_attention", (q, k, v, table, None, *rest, 0.2))}
    if window == keys == (8, 8):
        weights = [_tensor(out * width, width, 1, 1, dtype=dtype) for out in (3, 1)]
        layer = heads, window, shift, 0.2, 1e-5
        norm, others = _modulation(3 * width, width)
        others[-1] = _tensor(width)
        found[f"window_attention cosine {name}"] = "window_attention", (q, k, v, table, _tensor(heads), *rest, 1.0)
        found[f"window_attention dense {name}"] = "window_attention", (q, k, v, dense, None, *rest, 0.2)
        found[f"window_attention_layer {name}"] = (
            "window_attention_layer",
            (q, _tensor(width), _tensor(width), *weights, table, *others, *layer, True, True),
        )
    return found


def _depthwise_layer(width, dtype, label):
    x, weight, bias = _image(width, dtype), _tensor(width, 1, 3, 3, dtype=dtype), _tensor(width)
    rest = "gelu", 1e-5, True
    return {
        f"depthwise_layer {width} {label}": ("depthwise_layer", (x, weight, bias, None, None, *rest)),
        f"depthwise_layer norm {width} {label}": ("depthwise_layer", (x, weight, bias, bias, bias, *rest)),
    }


def _gated_projection(width, dtype, label):
    found = {}
    for name, batch in ((f"{width} {label}", 1), (f"each image {width} {label}", 2)):
        x = _image(width, dtype, batch=batch)
        gates = _tensor(width) if batch == 1 else _tensor(batch, width), _image(1, dtype, batch=batch)
        arguments = (x, x, *gates, _tensor(width, width, 1, 1, dtype=dtype), _tensor(width), x)
        found[f"gated_projection {name}"] = "gated_projection", arguments
    return found


def _pointwise_layer(width, dtype, label):
    x, two = _image(width, dtype), _image(width, dtype, batch=2)
    wide, square = (_tensor(out * width, width, 1, 1, dtype=dtype) for out in (3, 1))
    bias, norm, each = _tensor(3 * width), _tensor(width), _tensor(2, width)
    forms = {
        "norm": (x, wide, bias, None, norm, norm, "none"),
        "gelu": (x, wide, bias, None, norm, norm, "gelu"),
        "each image": (two, square, None, two, each, each, "none"),
        "residual": (x, square, norm, x, None, None, "none"),
    }
    return {
        f"pointwise_layer {form} {width} {label}": ("pointwise_layer", (*arguments, 1e-5, True))
        for form, arguments in forms.items()
    }


def _channel_attention_layer(width, heads, dtype, name):
    weights = [_tensor(3 * width, width, 1, 1, dtype=dtype), _tensor(3 * width, 1, 3, 3, dtype=dtype)]
    weights.append(_tensor(width, width, 1, 1, dtype=dtype))
    norm, rest = (_tensor(width), None), (None, False, 1e-5, False, True)
    arguments = (_image(width, dtype), *norm, *weights, _tensor(heads), *[None] * 4, heads)
    found = {f"channel_attention_layer {name}": ("channel_attention_layer", (*arguments, None, *rest))}
    if width == 48:
        windows = (*arguments, (8, 16), *rest)
        found[f"channel_attention_layer windows {name}"] = "channel_attention_layer", windows
    return found


def _feed_forward_layer(form, width, hidden, kernel, dtype, label):
    projected = hidden // 2 if form in ("gdfn", "sgfn") else hidden
    convolved = projected if form == "sgfn" else hidden
    weights = [_tensor(*shape, dtype=dtype) for shape in ((hidden, width, 1, 1), (convolved, 1, kernel, kernel))]
    weights.append(_tensor(width, projected, 1, 1, dtype=dtype))
    biases = [None] * 3 if form == "gdfn" else [_tensor(hidden), _tensor(convolved), _tensor(width)]
    inner = [_tensor(projected)] * 2 if form == "sgfn" else [None] * 2
    if form == "mlp":
        weights[1] = biases[1] = None
    norm = _tensor(width), None if form == "gdfn" else _tensor(width)
    arguments = (_image(width, dtype), *norm, *weights, form, *biases, *inner, None, 1e-5, form != "gdfn", 1e-5)
    return {f"feed_forward_layer {form} {width} {label}": ("feed_forward_layer", arguments)}


def _grid_attention(width, heads, grid, dtype, name):
    table, shape = _tensor((2 * grid - 1) ** 2, heads), (heads, grid)
    weights = _tensor(3 * width, width, 1, 1, dtype=dtype), _tensor(width, width, 1, 1, dtype=dtype)
    norm, others = _modulation(3 * width, width)
    return {
        f"grid_attention {name}": ("grid_attention", (_image(3 * width, dtype), table, *shape)),
        f"grid_attention_layer {name}": (
            "grid_attention_layer",
            (_image(width, dtype), _tensor(width), None, *weights, table, *[None] * 3, *shape, 1e-5, False),
        ),
        f"grid_attention_layer modulated {name}": (
            "grid_attention_layer",
            (_image(width, dtype, batch=2), *norm, *weights, table, *others, *shape, 1e-5, True),
        ),
    }


def _channel_attention(width, heads, dtype, name, window=32):
    x, qkv, temperature = _image(width, dtype), _image(3 * width, dtype), _tensor(heads)
    merge = [_tensor(heads, window, window)] * 2
    maps, two = (temperature, merge[0], *merge), (_tensor(2, heads), _tensor(2, heads, window, window), *merge)
    norm, others = _modulation(3 * width, 3 * width, width)
    weights = [_tensor(3 * width, width, 1, 1, dtype=dtype), _tensor(3 * width, 1, 3, 3, dtype=dtype)]
    weights.append(_tensor(width, width, 1, 1, dtype=dtype))
    return {
        f"channel_attention {name}": ("channel_attention", (x, x, x, temperature, heads, None, None, False)),
        f"channel_attention windows {name}": ("channel_attention", (x, x, x, temperature, heads, window, None, False)),
        f"focal_channel_attention {name}": ("focal_channel_attention", (qkv, *maps, heads, window, True)),
        f"focal_attention_layer {name}": (
            "focal_attention_layer",
            (x, _tensor(width), None, *weights, *maps, *[None] * 4, heads, window, 1e-5, False, True),
        ),
        f"focal_attention_layer modulated {name}": (
            "focal_attention_layer",
            (_image(width, dtype, batch=2), *norm, *weights, *two, *others, heads, window, 1e-5, True, False),
        ),
    }


def _feed_forward(width, x, norm, label):
    def weight(*shape):
        return _tensor(*shape, dtype=x.dtype)

    weights = weight(4 * width, width, 1, 1), weight(4 * width, 1, 5, 5), weight(width, 4 * width, 1, 1)
    merged = weight(2 * width, width, 1, 1), weight(4 * width, 2 * width, 1, 1)
    branches = [weight(4 * width, 1, size, size) for size in (5, 3, 1)]
    plain, (each, others) = [None] * 4, _modulation(4 * width, 4 * width, width)
    return {
        f"leffn {width} {label}": ("leffn", (x, *weights, *plain[1:])),
        f"leffn_layer {width} {label}": ("leffn_layer", (x, norm, norm, *weights, *plain, 1e-5, True)),
        f"leffn_layer bias-free {width} {label}": ("leffn_layer", (x, norm, None, *weights, *plain, 1e-5, False)),
        f"leffn_layer modulated {width} {label}": (
            "leffn_layer",
            (_image(width, x.dtype, batch=2), *each, *weights, *others, 1e-5, True),
        ),
        f"merge_pointwise {width} {label}": ("merge_pointwise", merged),
        f"merge_depthwise {width} {label}": ("merge_depthwise", (*branches, True)),
    }


def record_calls(pattern="", choice=0, narrow=False):
    """All launches of the calls whose name matches; ``narrow``: of every operator its first one."""
    launches, seen = [], set()
    for name, (operator, arguments) in calls().items():
        if not re.search(pattern, name) or (narrow and operator in seen):
            continue
        seen.add(operator)
        with _launch.record(choice) as recorded:
            out = getattr(ipt_fast.kernels, operator)(*arguments)
            if operator == "add_layer_norm":
                x, branch, *others = arguments
                out, arguments = out[1], (x, *others[:-1], x if branch is not None else None)
            getattr(ipt_fast.kernels, f"{operator}_backward")(torch.empty_like(out), *arguments)
        launches += recorded
    return launches
