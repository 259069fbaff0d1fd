"""Every operator once: inputs, FLOPs, bytes and rivals.

Operators on images have the sizes of IPT-V2 small, level 1, on a 256 x 256 image; layers those of all levels of IPT-V2
small and base. Operators on tokens have those of IPT, 16 tiles.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from benchmarks import baseline, rivals, roofline


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured call.

    ``inputs(dtype)`` makes the tensors, images channels-last and first, weights as parameters and last; ``ours`` and
    every rival take ``(*inputs, **keywords)``.
    """

    name: str
    inputs: Callable
    ours: Callable
    rivals: dict
    keywords: dict = dataclasses.field(default_factory=dict)

    def compiled(self, name):
        """The rival ``name`` under torch.compile, for the sizes of this case."""
        return torch.compile(self.rivals[name], dynamic=False)

    def baked(self, name, inputs):
        """(the rival ``name`` as a module that has the weights among ``inputs``, the other inputs)."""
        data = [t for t in inputs if not isinstance(t, torch.nn.Parameter)]
        return rivals.Baked(self.rivals[name], inputs[len(data) :], self.keywords), data

    def work(self, inputs):
        """The :class:`roofline.Work` of a forward."""
        plain = self.rivals["eager"]
        depthwise = roofline.depthwise_flops(lambda *tensors: plain(*tensors, **self.keywords), inputs)
        return roofline.Work(self.flops(inputs), self.bytes(inputs), depthwise)

    def flops(self, inputs):
        """Matrix products and convolutions by the operators' registered formulas, 2 per multiply-accumulate."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.ours(*inputs, **self.keywords)
        return counter.get_total_flops()

    def bytes(self, inputs):
        """Every input read once and every output written once."""
        with torch.no_grad():
            out = self.ours(*inputs, **self.keywords)
        return sum(t.numel() * t.element_size() for t in (*inputs, *(out if isinstance(out, tuple) else (out,))))


def image(channels, size=256, batch=1):
    def make(dtype):
        x = torch.rand(batch, channels, size, size, dtype=dtype) - 0.5
        return x.contiguous(memory_format=torch.channels_last)

    return make


def tokens(batch, dim=576, count=256):
    """Those of IPT's 48 x 48 tiles."""
    return lambda dtype: torch.rand(batch, count, dim, dtype=dtype) - 0.5


def parameter(*shape):
    """Small but not zero, so that nothing is trivial."""

    def make(dtype):
        return torch.nn.Parameter((torch.rand(*shape) - 0.5).add_(0.75).to(dtype), requires_grad=False)

    return make


def _inputs(*makers):
    return lambda dtype: [make(dtype) for make in makers]


def _operator(label, operator, makers, keywords=None, **rivals):
    """A case whose rivals are the plain formula, eager and compiled, besides those given."""
    plain = baseline.formula(operator)
    return Case(label, _inputs(*makers), getattr(ipt_fast.ops, operator), {"eager": plain, **rivals}, keywords or {})


def _bias_free(function):
    """A layer without the norm's bias, as a function of tensors only."""

    def call(x, norm_weight, *others, **keywords):
        return function(x, norm_weight, None, *others, centered=False, **keywords)

    return call


def _layer(label, operator, makers, keywords, **rivals):
    rivals = {"eager": baseline.formula(operator), **rivals}
    rivals = {name: _bias_free(rival) for name, rival in rivals.items()}
    return Case(label, _inputs(*makers), _bias_free(getattr(ipt_fast.ops, operator)), rivals, keywords)


def _focal_layer(channels, heads, size, window=32):
    makers = [image(channels, size), parameter(channels), parameter(3 * channels, channels, 1, 1)]
    makers += [parameter(3 * channels, 1, 3, 3), parameter(channels, channels, 1, 1), parameter(heads)]
    makers += [parameter(heads, window, window)] * 3
    label = f"focal_attention_layer 1x{channels}x{size}x{size} p{window}"
    return _layer(label, "focal_attention_layer", makers, {"num_heads": heads, "window_size": window})


def _convolution(channels, outputs, size):
    makers = [image(channels, size), parameter(outputs, channels, 3, 3), parameter(outputs)]
    return _operator(f"dense_convolution 1x{channels}x{size}x{size} to {outputs}", "dense_convolution", makers)


def _grid_layer(channels, heads, size, grid=8):
    makers = [image(channels, size), parameter(channels), parameter(3 * channels, channels, 1, 1)]
    makers += [parameter(channels, channels, 1, 1), parameter((2 * grid - 1) ** 2, heads)]
    label = f"grid_attention_layer 1x{channels}x{size}x{size} g{grid}"
    keywords = {"num_heads": heads, "grid_size": grid}
    return _layer(label, "grid_attention_layer", makers, keywords, sdpa=baseline.sdpa_grid_layer)


def _leffn_layer(channels, size):
    makers = [image(channels, size), parameter(channels), parameter(4 * channels, channels, 1, 1)]
    makers += [parameter(4 * channels, 1, 5, 5), parameter(channels, 4 * channels, 1, 1)]
    return _layer(f"leffn_layer 1x{channels}x{size}x{size}", "leffn_layer", makers, {})


def _window_layer(channels, heads, size, window, shift):
    """A layer of SwinIR or HAT, which has a norm with a bias."""
    makers = [image(channels, size), parameter(channels), parameter(channels), parameter(3 * channels, channels, 1, 1)]
    makers += [parameter(channels, channels, 1, 1), parameter((2 * window - 1) ** 2, heads)]
    label = f"window_attention_layer 1x{channels}x{size}x{size} w{window}"
    keywords = {"num_heads": heads, "window_size": window, "shift": shift}
    return _operator(label, "window_attention_layer", makers, keywords, sdpa=baseline.sdpa_window_layer)


def _restormer_layers(channels, heads, size):
    """Both layers of a block of Restormer without biases."""
    hidden = int(2.66 * channels)
    attention = [image(channels, size), parameter(channels), parameter(3 * channels, channels, 1, 1)]
    attention += [parameter(3 * channels, 1, 3, 3), parameter(channels, channels, 1, 1), parameter(heads)]
    network = [image(channels, size), parameter(channels), parameter(2 * hidden, channels, 1, 1)]
    network += [parameter(2 * hidden, 1, 3, 3), parameter(channels, hidden, 1, 1)]
    shape = f"1x{channels}x{size}x{size}"
    return [
        _layer(f"channel_attention_layer {shape}", "channel_attention_layer", attention, {"num_heads": heads}),
        _layer(f"feed_forward_layer {shape} gdfn", "feed_forward_layer", network, {"form": "gdfn"}),
    ]


def _mlp(channels, hidden, size):
    """Linear, GELU, linear, as layers of SwinIR and HAT have it."""

    def without_depthwise(function):
        return lambda x, weight, bias, expand, project, **keywords: function(
            x, weight, bias, expand, None, project, **keywords
        )

    makers = [image(channels, size), parameter(channels), parameter(channels), parameter(hidden, channels, 1, 1)]
    makers += [parameter(channels, hidden, 1, 1)]
    plain = without_depthwise(baseline.formula("feed_forward_layer"))
    ours = without_depthwise(ipt_fast.ops.feed_forward_layer)
    label = f"feed_forward_layer 1x{channels}x{size}x{size} mlp"
    return Case(label, _inputs(*makers), ours, {"eager": plain}, {"form": "mlp"})


def _on_tokens(batch=16, dim=576, count=256):
    """The three operators of a layer of IPT, self-attention's projection to q, k and v with offsets of q and k."""
    stream, norm = tokens(batch, dim, count), [parameter(dim), parameter(dim)]
    size, network = f"{batch}x{count}x{dim}", [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    qkv, query = [parameter(3 * dim, dim), parameter(count, 2 * dim)], [parameter(dim, dim), parameter(count, dim)]
    return [
        _operator(f"norm_projection {size}", "norm_projection", [stream, *norm, *qkv]),
        _operator(f"add_norm_projection {size}", "add_norm_projection", [stream, stream, *norm, *query]),
        _operator(
            f"add_norm_feed_forward {size}",
            "add_norm_feed_forward",
            [stream, stream, *norm, *(parameter(*shape) for shape in network)],
        ),
    ]


# (channels, heads, size of the map) of the levels of IPT-V2 small and base on a 256 x 256 image; the second is the
# decoder's first level, too, on the whole map.
SMALL = ((32, 1, 256), (64, 2, 256), (64, 2, 128), (128, 4, 64), (256, 8, 32))
BASE = ((48, 1, 256), (96, 2, 256), (192, 4, 64), (384, 8, 32))

LAYERS = [
    *(_focal_layer(*sizes) for sizes in (*SMALL, *BASE)),
    *(_grid_layer(*sizes) for sizes in SMALL),
    *(_grid_layer(*sizes, grid=16) for sizes in BASE),
    *(_leffn_layer(channels, size) for channels, _, size in (*SMALL, *BASE)),
]

# Of SwinIR-light, SwinIR-M, HAT and ESRGAN, and of the levels of Restormer on a 256 x 256 image.
RELATIVES = [
    _window_layer(60, 6, 128, 8, 4),
    _window_layer(180, 6, 128, 8, 4),
    _window_layer(180, 6, 64, 16, 8),
    _mlp(60, 120, 128),
    _operator("depthwise_layer 1x120x128x128", "depthwise_layer", [image(120, 128), parameter(120, 1, 3, 3)]),
    _operator(
        "gated_projection 1x60x64x64",
        "gated_projection",
        [image(60, 64), image(60, 64), parameter(60), image(1, 64), parameter(60, 60, 1, 1)],
    ),
    _operator(
        "pointwise_layer 1x180x64x64",
        "pointwise_layer",
        [image(180, 64), parameter(360, 180, 1, 1), parameter(360)],
        {"activation": "gelu"},
    ),
    _mlp(180, 360, 128),
    *(
        layer
        for sizes in ((48, 1, 256), (96, 2, 256), (192, 4, 64), (384, 8, 32))
        for layer in _restormer_layers(*sizes)
    ),
    _convolution(180, 60, 64),
    _convolution(180, 180, 64),
    _convolution(64, 64, 128),
    _operator(
        "window_attention 1x180x64x64 w16 k24",
        "window_attention",
        [image(180, 64), image(180, 64), image(180, 64), parameter(6, 256, 576)],
        {"num_heads": 6, "window_size": 16, "key_size": 24},
    ),
]

CASES = [
    _operator(
        "layer_norm_2d bias-free 1x32x256x256",
        "layer_norm_2d",
        [image(32), parameter(32)],
        {"centered": False},
    ),
    _operator(
        "layer_norm_2d with bias 1x32x256x256",
        "layer_norm_2d",
        [image(32), parameter(32), parameter(32)],
        native=baseline.native_layer_norm,
    ),
    _operator(
        "channel_attention 1x32x256x256",
        "channel_attention",
        [image(32), image(32), image(32), parameter(1)],
        {"num_heads": 1},
    ),
    _operator(
        "focal_channel_attention 1x32x256x256 p32",
        "focal_channel_attention",
        [image(96), parameter(1), *[parameter(1, 32, 32)] * 3],
        {"num_heads": 1, "window_size": 32},
    ),
    _operator(
        "grid_attention 1x32x256x256 g8",
        "grid_attention",
        [image(96), parameter(225, 1)],
        {"num_heads": 1, "grid_size": 8},
        sdpa=baseline.sdpa_grid_attention,
    ),
    _operator(
        "leffn 1x32x256x256",
        "leffn",
        [image(32), parameter(128, 32, 1, 1), parameter(128, 1, 5, 5), parameter(32, 128, 1, 1)],
    ),
    *LAYERS,
    *RELATIVES,
    _operator(
        "merge_pointwise 256-512-1024",
        "merge_pointwise",
        [parameter(512, 256, 1, 1), parameter(1024, 512, 1, 1)],
    ),
    _operator(
        "merge_depthwise 1024",
        "merge_depthwise",
        [parameter(1024, 1, 5, 5), parameter(1024, 1, 3, 3), parameter(1024, 1, 1, 1)],
    ),
    *_on_tokens(),
]

# On GPUs: full-resolution levels of IPT-V2 base (48 channels, 96 in the decoder) and small, 512 x 512.
GPU_CASES = [
    _operator("layer_norm_2d with bias 1x48x512x512", "layer_norm_2d", [image(48, 512), parameter(48), parameter(48)]),
    _operator(
        "channel_attention 1x48x512x512",
        "channel_attention",
        [image(48, 512), image(48, 512), image(48, 512), parameter(1)],
        {"num_heads": 1},
    ),
    _operator(
        "focal_channel_attention 1x48x512x512 p32",
        "focal_channel_attention",
        [image(144, 512), parameter(1), *[parameter(1, 32, 32)] * 3],
        {"num_heads": 1, "window_size": 32},
    ),
    _operator(
        "grid_attention 1x48x512x512 g16",
        "grid_attention",
        [image(144, 512), parameter(961, 1)],
        {"num_heads": 1, "grid_size": 16},
        sdpa=baseline.sdpa_grid_attention,
        flex=baseline.flex_grid_attention,
    ),
    *(_focal_layer(*sizes) for sizes in ((48, 1, 512), (96, 2, 512))),
    *(_grid_layer(*sizes) for sizes in ((48, 1, 512, 16), (96, 2, 512, 16), (32, 1, 512, 8))),
    *(_leffn_layer(*sizes) for sizes in ((48, 512), (96, 512))),
    _operator(
        "merge_pointwise 384-768-1536", "merge_pointwise", [parameter(768, 384, 1, 1), parameter(1536, 768, 1, 1)]
    ),
    _operator(
        "merge_depthwise 1536",
        "merge_depthwise",
        [parameter(1536, 1, 5, 5), parameter(1536, 1, 3, 3), parameter(1536, 1, 1, 1)],
    ),
    *_on_tokens(),
]
