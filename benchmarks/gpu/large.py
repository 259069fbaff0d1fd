"""Layers on maps of more than 2^31 values, judged on a part of the map that is also computed on its own."""

import torch

import ipt_fast
from tests.ops import cases

CHANNELS = 48
SIDE = 6752  # times itself times 48 channels is 2.19e9 values; 211 windows of 32, 422 steps of a grid of 16
WINDOW, GRID = 32, 16


def check(name, backend):
    """(what was compared, error, allowed) of a layer on a bf16 map; the last pixels have the largest addresses."""
    tensors, options, whole, cut = CHECKS[name]()
    x = torch.empty(1, SIDE, SIDE, CHANNELS, dtype=torch.bfloat16, device="cuda").normal_().permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    function = getattr(ipt_fast.ops, name)
    with torch.no_grad():
        with ipt_fast.use_backend(backend):
            out = cut(function(x, **tensors, **options))
        part = whole(x).contiguous(memory_format=torch.channels_last)
        del x
        with ipt_fast.use_backend("reference"):
            truth = function(part.double(), **{n: t.double() for n, t in tensors.items()}, **options)
            plain = function(part, **tensors, **options)
        if name != "grid_attention_layer":
            truth, plain = cut(truth), cut(plain)
    error, of_plain = cases.error(out, truth), cases.error(plain, truth)
    return out, error, max(2 * of_plain, 2 * torch.finfo(torch.bfloat16).eps)


def _tensors(call, **fields):
    _, builder, _ = cases.CALLS[call]
    tensors, options = builder(1, 1, 1, **fields)
    del tensors["x"]
    tensors = {n: t.to("cuda", torch.bfloat16) for n, t in tensors.items()}
    return tensors, options


def _leffn():
    """A pixel depends on those within 2 of it: a corner of 64 with 2 more."""
    tensors = _tensors("leffn_layer/bias_free", channels=CHANNELS, hidden=4 * CHANNELS)
    return *tensors, lambda x: x[..., -66:, -66:], lambda y: y[..., -64:, -64:]


def _focal():
    """Of the last 128 rows and columns the shifted window that begins at 48 lies in whole windows of both kinds."""
    tensors = _tensors("focal_attention_layer/bias_free", heads=1, depth=CHANNELS, window=WINDOW)
    return *tensors, lambda x: x[..., -128:, -128:], lambda y: y[..., -80:-48, -80:-48]


def _grid():
    """The last lattice is a map of GRID x GRID pixels with one lattice."""
    tensors = _tensors("grid_attention_layer/bias_free", heads=1, depth=CHANNELS, grid=GRID)
    step = SIDE // GRID
    return (
        *tensors,
        lambda x: x[..., step - 1 :: step, step - 1 :: step],
        lambda y: y[..., step - 1 :: step, step - 1 :: step],
    )


CHECKS = {"leffn_layer": _leffn, "focal_attention_layer": _focal, "grid_attention_layer": _grid}
