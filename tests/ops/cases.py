"""One or more calls of every operator, and the error rule by which their results are judged."""

import contextlib
import copy
import functools
import hashlib
import itertools
import os

import torch

from ipt_fast import ops, reference
from tests.ops import relatives
from tests.ops.values import biases as _biases
from tests.ops.values import norm as _norm
from tests.ops.values import norm_options as _norm_options
from tests.ops.values import pointwise as _pointwise
from tests.ops.values import random as _random

DEVICE = os.environ.get("IPT_FAST_TEST_DEVICE", "cpu")  # "cuda": the same tests on a GPU

IMAGES = {"x", "q", "k", "v", "qkv", "other", "pixel_gate", "residual"}
WEIGHTS = {"expand_weight", "depthwise_weight", "project_weight", "qkv_weight", "first", "second", "k5", "k3", "k1"}
OPERATORS = list(ops.__all__)
MERGES = {"merge_pointwise", "merge_depthwise"}
ON_TOKENS = {"norm_projection", "add_norm_projection", "add_norm_feed_forward"}
# whose weight has no longer name
CONVOLUTIONS = {"dense_convolution", "depthwise_layer", "gated_projection", "pointwise_layer"}
TOKEN_WEIGHTS = {"weight", "offset", "weight1", "bias1", "weight2", "bias2"}


def _layer_norm_2d(batch, height, width, *, channels=10, bias=True, centered=True, each_image=False):
    shape = (batch, channels) if each_image else (channels,)
    tensors = {"x": _random(batch, channels, height, width) + 0.5, "weight": 1 + 0.3 * _random(*shape)}
    return tensors | ({"bias": _random(*shape)} if bias else {}), {"eps": 1e-5, "centered": centered}


def _focal_channel_attention(batch, height, width, *, heads=2, depth=3, window=4, branches=(), cyclic=True):
    tensors = {"qkv": _random(batch, 3 * heads * depth, height, width)}
    tensors["temperature"] = 0.5 + torch.rand(*branches, heads, dtype=torch.float64)
    tensors["token_weight"] = 1 + 0.3 * _random(*branches, heads, window, window)
    for name in ("top_weight", "bottom_weight"):
        tensors[name] = 1 + 0.3 * _random(heads, window, window)
    return tensors, {"num_heads": heads, "window_size": window, **({} if cyclic else {"cyclic": False})}


def _grid_attention(batch, height, width, *, heads=2, depth=3, grid=3, bias=True):
    tensors = {"qkv": _random(batch, 3 * heads * depth, height, width)}
    if bias:
        tensors["bias_table"] = _random((2 * grid - 1) ** 2, heads)
    return tensors, {"num_heads": heads, "grid_size": grid}


def _leffn(batch, height, width, *, channels=5, hidden=11, out=7, kernel=5, biases=False):
    outputs = {"expand": hidden, "depthwise": hidden, "project": out} if biases else {}
    return {
        "x": _random(batch, channels, height, width),
        "expand_weight": _random(hidden, channels, 1, 1) * channels**-0.5,
        "depthwise_weight": _random(hidden, 1, kernel, kernel) / kernel,
        "project_weight": _random(out, hidden, 1, 1) * hidden**-0.5,
        **_biases(outputs),
    }, {}


def _focal_attention_layer(batch, height, width, *, heads=2, depth=3, bias=True, **fields):
    channels = heads * depth
    attention, options = _focal_channel_attention(batch, height, width, heads=heads, depth=depth, **fields)
    del attention["qkv"]
    return {
        "x": _random(batch, channels, height, width),
        **_norm(channels, bias),
        "qkv_weight": _pointwise(3 * channels, channels),
        "depthwise_weight": _random(3 * channels, 1, 3, 3) / 3,
        "project_weight": _pointwise(channels, channels),
        **attention,
    }, {**options, **_norm_options(bias)}


def _grid_attention_layer(batch, height, width, *, heads=2, depth=3, grid=3, bias=True):
    channels = heads * depth
    attention, options = _grid_attention(batch, height, width, heads=heads, depth=depth, grid=grid)
    del attention["qkv"]
    return {
        "x": _random(batch, channels, height, width),
        **_norm(channels, bias),
        "qkv_weight": _pointwise(3 * channels, channels),
        "project_weight": _pointwise(channels, channels),
        **attention,
    }, {**options, **_norm_options(bias)}


def _leffn_layer(batch, height, width, *, channels=5, hidden=11, kernel=5, bias=True):
    network, _ = _leffn(batch, height, width, channels=channels, hidden=hidden, out=channels, kernel=kernel)
    return {"x": network.pop("x"), **_norm(channels, bias), **network}, _norm_options(bias)


def _modulated(call, batch, *size, each_image=True, **fields):
    """A layer with biases, a gate and an ordinary norm; both of each image, as latent diffusion models have them."""
    tensors, options = call(batch, *size, **fields)
    shape = (batch, tensors["x"].shape[1]) if each_image else tensors["x"].shape[1:2]
    outputs = {name[:-7]: len(value) for name, value in tensors.items() if name in WEIGHTS}
    norm = {"norm_weight": 1 + 0.3 * _random(*shape), "norm_bias": _random(*shape)}
    return {**tensors, **norm, **_biases(outputs), "gate": 0.5 * _random(*shape)}, options


_modulated_focal_attention_layer = functools.partial(_modulated, _focal_attention_layer)
_modulated_grid_attention_layer = functools.partial(_modulated, _grid_attention_layer)
_modulated_leffn_layer = functools.partial(_modulated, _leffn_layer)


def _merge_pointwise(*_):
    return {"first": _random(5, 3, 1, 1), "second": _random(7, 5, 1, 1)}, {}


def _merge_depthwise(*_, identity=True):
    return {f"k{size}": _random(6, 1, size, size) for size in (5, 3, 1)}, {"identity": identity}


def _linear(out, channels):
    return _random(out, channels) * channels**-0.5


def _token_norm(dim, norm):
    tensors = {"norm_weight": 1 + 0.3 * _random(dim), "norm_bias": _random(dim)} if norm else {}
    return tensors, {"eps": 1e-5, **({} if norm else {"norm_weight": None, "norm_bias": None})}


def _norm_projection(batch, height, width, *, dim=6, out=10, offset=4, norm=True, branch=False):
    tokens = height * width
    parameters, options = _token_norm(dim, norm)
    tensors = {"x": _random(batch, tokens, dim) + 0.5}
    tensors |= {"branch": _random(batch, tokens, dim)} if branch else {}
    tensors |= {**parameters, "weight": _linear(out, dim)}
    return tensors | ({"offset": _random(tokens, offset)} if offset else {}), options


def _add_norm_feed_forward(batch, height, width, *, dim=6, hidden=11, norm=True):
    tensors, options = _norm_projection(batch, height, width, dim=dim, out=hidden, offset=0, norm=norm, branch=True)
    tensors["weight1"] = tensors.pop("weight")
    # Far from where the ReLU turns, lest rounding decide whether a gradient passes.
    bias1 = _random(hidden) + 8 * (-1.0) ** torch.arange(hidden)
    tensors |= {"bias1": bias1, "weight2": _linear(dim, hidden), "bias2": _random(dim)}
    return tensors, options


RELEASED = {"branches": (2,), "cyclic": False}  # reading of FCSA
SCALED = {"each_image": False}
# name of the call: (operator, builder(batch, height, width, **fields), fields)
CALLS = {
    "layer_norm_2d": ("layer_norm_2d", _layer_norm_2d, {}),
    "layer_norm_2d/bias_free": ("layer_norm_2d", _layer_norm_2d, {"bias": False, "centered": False}),
    "layer_norm_2d/33_channels": ("layer_norm_2d", _layer_norm_2d, {"channels": 33, "bias": False}),
    "layer_norm_2d/each_image": ("layer_norm_2d", _layer_norm_2d, {"each_image": True}),
    "channel_attention": ("channel_attention", relatives.channel_attention, {}),
    "channel_attention/windows": (
        "channel_attention",
        relatives.channel_attention,
        {"window": 4, "heads": 1, "depth": 5},
    ),
    "focal_channel_attention": ("focal_channel_attention", _focal_channel_attention, {}),
    "focal_channel_attention/odd_window": ("focal_channel_attention", _focal_channel_attention, {"window": 5}),
    "focal_channel_attention/two": ("focal_channel_attention", _focal_channel_attention, {"branches": (2,)}),
    "focal_channel_attention/released": ("focal_channel_attention", _focal_channel_attention, RELEASED),
    "grid_attention": ("grid_attention", _grid_attention, {}),
    "grid_attention/no_bias": ("grid_attention", _grid_attention, {"bias": False, "heads": 1, "grid": 4}),
    "leffn": ("leffn", _leffn, {}),
    "leffn/3x3": ("leffn", _leffn, {"kernel": 3, "out": 5}),
    "leffn/biases": ("leffn", _leffn, {"biases": True}),
    "focal_attention_layer": ("focal_attention_layer", _focal_attention_layer, {}),
    "focal_attention_layer/bias_free": ("focal_attention_layer", _focal_attention_layer, {"bias": False, "window": 5}),
    "focal_attention_layer/modulated": ("focal_attention_layer", _modulated_focal_attention_layer, RELEASED),
    "focal_attention_layer/layer_scale": ("focal_attention_layer", _modulated_focal_attention_layer, SCALED),
    "grid_attention_layer": ("grid_attention_layer", _grid_attention_layer, {}),
    "grid_attention_layer/bias_free": ("grid_attention_layer", _grid_attention_layer, {"bias": False, "heads": 1}),
    "grid_attention_layer/modulated": ("grid_attention_layer", _modulated_grid_attention_layer, {}),
    "grid_attention_layer/layer_scale": ("grid_attention_layer", _modulated_grid_attention_layer, SCALED),
    "leffn_layer": ("leffn_layer", _leffn_layer, {}),
    "leffn_layer/bias_free": ("leffn_layer", _leffn_layer, {"bias": False}),
    "leffn_layer/modulated": ("leffn_layer", _modulated_leffn_layer, {}),
    "leffn_layer/layer_scale": ("leffn_layer", _modulated_leffn_layer, SCALED),
    "merge_pointwise": ("merge_pointwise", _merge_pointwise, {}),
    "merge_depthwise": ("merge_depthwise", _merge_depthwise, {}),
    "merge_depthwise/no_identity": ("merge_depthwise", _merge_depthwise, {"identity": False}),
    "norm_projection": ("norm_projection", _norm_projection, {}),
    "norm_projection/no_norm": ("norm_projection", _norm_projection, {"norm": False, "offset": 0}),
    "add_norm_projection": ("add_norm_projection", _norm_projection, {"branch": True}),
    "add_norm_projection/no_norm": ("add_norm_projection", _norm_projection, {"branch": True, "norm": False}),
    "add_norm_feed_forward": ("add_norm_feed_forward", _add_norm_feed_forward, {}),
    "add_norm_feed_forward/no_norm": ("add_norm_feed_forward", _add_norm_feed_forward, {"norm": False}),
    **relatives.CALLS,
}
IMAGE_CALLS = [name for name, (operator, *_) in CALLS.items() if operator not in MERGES | ON_TOKENS]
TOKEN_CALLS = [name for name, (operator, *_) in CALLS.items() if operator in ON_TOKENS]


def build(call, shape=(2, 7, 9), dtype=torch.float64, small_dtype=None):
    """(operator name, tensors by argument name, other arguments by name) of a call, on random values."""
    operator, builder, fields = CALLS[call]
    tensors, options = builder(*shape, **fields)
    return operator, cast(tensors, dtype, small_dtype), options


def cast(tensors, dtype, small_dtype=None):
    def of(name, value):
        norm = name == "weight" and value.dim() == 1  # of layer_norm_2d
        large = name in IMAGES | WEIGHTS | TOKEN_WEIGHTS | {"branch"} and not norm
        return dtype if large else small_dtype or dtype

    return {name: value.detach().to(DEVICE, of(name, value)) for name, value in tensors.items()}


def cast_by_autocast(operator, tensors, dtype):
    """What autocast makes of tensors of float32: it casts images and weights, no tokens and no small parameters."""
    names = TOKEN_WEIGHTS if operator in ON_TOKENS else IMAGES | WEIGHTS
    names = names | {"weight"} if operator in CONVOLUTIONS else names
    return {name: value.detach().to(dtype) if name in names else value.detach() for name, value in tensors.items()}


def outputs(operator, tensors, options):
    """A tuple of the outputs."""
    found = getattr(ops, operator)(**tensors, **options)
    return found if isinstance(found, tuple) else (found,)


def as_one(found):
    """The output; several outputs as one tensor, one behind the other."""
    return found if isinstance(found, torch.Tensor) else torch.cat([each.flatten() for each in found])


def public(operator, tensors, options):
    return as_one(getattr(ops, operator)(**tensors, **options))


def forward_and_gradients(function, tensors, options, grad):
    """{"out": …, argument: its gradient} of ``function(**tensors, **options)``."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    out = as_one(function(**leaves, **options))
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def remembered(function):
    """Equal values give the same result, computed once: the layouts and instruction sets of one call share it."""
    known = {}

    @functools.wraps(function)
    def call(operator, tensors, options, grad):
        values = {**tensors, "gradient of out": grad}
        key = operator, repr(options), *((name, fingerprint(value)) for name, value in values.items())
        if key not in known:
            known[key] = function(operator, tensors, options, grad)
            if len(known) > 32:
                del known[next(iter(known))]
        return copy.copy(known[key])

    return call


def fingerprint(value):
    data = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return value.device, value.dtype, value.shape, hashlib.sha256(data).digest()


@remembered
def exact(operator, tensors, options, grad):
    """Output and gradients of the reference in fp64, on the same (already rounded) values."""
    formula = getattr(reference, operator).formula
    return forward_and_gradients(formula, cast(tensors, torch.float64), options, grad.double())


@remembered
def baseline(operator, tensors, options, grad):
    """`Baseline` of the formula from PyTorch operators, every intermediate in the dtype of the images and weights."""
    formula = getattr(reference, operator).formula

    def run(dtype, grad, tensors):
        return forward_and_gradients(formula, cast(tensors, dtype), options, grad.to(dtype))

    return Baseline(run, next(iter(tensors.values())).dtype, grad, tensors)


# How often the baseline may be drawn, and the units in the last place that are always allowed. Kernels keep sums of
# 16-bit values in float32: what they lose by rounding is half a unit, far from what sums of 16 bits lose.
DRAWS = 6
FLOOR = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


class Baseline:
    """Largest errors, by name, of ``run(dtype, grad, tensors)``, a dict of tensors, against fp64, over several draws.

    The error of one draw on one matrix library is chance, above all where a result has few values. So the values are
    moved by up to two units in the last place of ``dtype``, which rounds anew and leaves the problem as well
    conditioned as it was, and PyTorch is made to add in other orders. A limit only grows by another draw, hence none is
    made before a result needs it. A draw in which the baseline overflows allows nothing.
    """

    def __init__(self, run, dtype, grad, tensors):
        self.run, self.dtype, self.tensors = run, dtype, {**tensors, "gradient of out": grad}
        self.errors, self.draws = {}, itertools.count()

    def draw(self):
        """False if there were enough draws."""
        if (draw := next(self.draws)) >= DRAWS:
            return False
        near = nearby(self.tensors, self.dtype, draw)
        arguments = near.pop("gradient of out"), near
        truth = self.run(torch.float64, *arguments)
        with another_way(draw):
            results = self.run(self.dtype, *arguments)
        for name, value in results.items():
            found = error(value, truth[name])
            self.errors[name] = max(self.errors.get(name, 0.0), found if found < float("inf") else 0.0)
        return True


def nearby(tensors, dtype, draw):
    """The tensors, their numbers a little nearer to zero, in float32 in both layouts by turns."""
    if draw == 0:
        return dict(tensors)
    generator = torch.Generator().manual_seed(draw)

    def moved(value):
        factor = 1 - 2 * torch.finfo(dtype).eps * torch.rand(value.shape, generator=generator, dtype=torch.float64)
        value = (value.double() * factor.to(value.device)).to(value.dtype)
        channels_last = dtype == torch.float32 and value.dim() == 4 and draw % 2
        return value.contiguous(memory_format=torch.channels_last) if channels_last else value

    return {name: moved(value) for name, value in tensors.items()}


@contextlib.contextmanager
def another_way(draw):
    """Other numbers of threads, and from the fourth draw on without oneDNN."""
    threads = torch.get_num_threads()
    torch.set_num_threads((threads, 1, 2)[draw % 3])
    try:
        with torch.backends.mkldnn.flags(draw < 3, allow_tf32=None):
            yield
    finally:
        torch.set_num_threads(threads)


def error(value, truth):
    """max |value - truth| / max |truth|; nan and inf count as infinitely wrong."""
    assert value.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    difference = (value.double() - truth).abs().max().item()
    scale = truth.abs().max().item()
    return float("inf") if difference != difference else difference / scale if scale else difference


def assert_within_rule(got, truth, base):
    """At most twice the baseline's largest error, thrice for gradients; `FLOOR` units in the last place are allowed.

    Gradients pass through the operator twice, so their floor is twice as high.
    """
    assert_all_within_rule([(got, truth, base)])


def assert_all_within_rule(results):
    """The rule for the largest errors of several (got, truth, base): for kernels that round as the baseline does."""
    while too_large := beyond_rule(results):
        assert any([base.draw() for *_, base in results]), too_large


def beyond_rule(results):
    """A sentence for every name whose error is above what the draws so far allow."""
    return [
        f"{name}: error {found:.2e}, allowed {allowed:.2e}"
        for name, (found, allowed) in errors_and_limits(results).items()
        if not found <= allowed
    ]


def errors_and_limits(results):
    """{name: (its largest error, what the draws so far allow)}."""
    pairs = {}
    for name, first in results[0][0].items():
        eps, smallest = torch.finfo(first.dtype).eps, torch.finfo(first.dtype).smallest_normal
        found = max(error(got[name], truth[name]) for got, truth, _ in results)
        of_base = max(base.errors.get(name, 0.0) for *_, base in results)
        scale = max(truth[name].abs().max().item() if truth[name].numel() else 1.0 for _, truth, _ in results)
        units = FLOOR[first.dtype] * (1 if name == "out" else 2)
        allowed = max((2 if name == "out" else 3) * of_base, units * (eps + smallest * eps / (scale or 1.0)))
        pairs[name] = found, allowed
    return pairs
