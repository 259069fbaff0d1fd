"""Operators of IPT-V2's relatives with options that CALLS leaves out, on maps small enough for every backend."""

import pytest
import torch

import ipt_fast
from tests.ops.cases import CALLS, assert_within_rule, baseline, cast, exact
from tests.ops.test_parity import gradient_of_output, on_backend, runnable

LONG = {"window": (5, 13), "heads": 1}  # more tokens than a block of Triton's
# name: (call, shape, fields)
CASES = {
    "a long window": ("window_attention", (1, 4, 7), {**LONG, "shift": (3, 0), "cosine": True}),
    "a tall window of narrow heads": (
        "window_attention", (1, 18, 6), {"window": (17, 4), "heads": 3, "depth": 5, "shift": (6, 1)},
    ),
    "many keys beyond the border": ("window_attention/overlapping", (1, 5, 3), {"keys": (10, 8), "heads": 1}),
    "overlapping keys of cosine attention": ("window_attention/overlapping", (1, 5, 3), {"cosine": True}),
    "fewer keys": ("window_attention", (1, 6, 4), {"window": (4, 4), "shift": (2, 2), "reduction": 2}),
    "a layer of dense biases": ("window_attention_layer", (2, 3, 5), {"dense": True, "residual": False}),
    "dilated": ("channel_attention/dilated", (2, 3, 5), {"dilation": 2, "heads": 1}),
    "more dilated than large": ("channel_attention/dilated", (1, 1, 3), {"dilation": 4}),
    "overlapping": ("channel_attention/overlapping", (2, 7, 3), {"heads": 1}),
    "rectangular windows": ("channel_attention", (1, 5, 7), {"window": (2, 4)}),
    "a layer of overlapping windows": (
        "channel_attention_layer", (1, 4, 7), {"window_size": (3, 4), "overlapping": True, "residual": False},
    ),
    "a norm of each image": ("depthwise_layer", (2, 3, 5), {"each_image": True, "kernel": 5}),
    "a depthwise convolution alone": ("depthwise_layer", (2, 3, 5), {"normed": False, "activation": "none"}),
    "an even wider one": ("depthwise_layer", (1, 4, 9), {"kernel": 7, "bias": False, "activation": "none"}),
    "a pointwise convolution, a norm of each image": (
        "pointwise_layer", (2, 3, 5), {"each_image": True, "channels": 16, "activation": "none"},
    ),
    "a pointwise convolution alone": (
        "pointwise_layer/no_norm", (2, 3, 5), {"extras": False, "channels": 7, "outputs": 32},
    ),
    "a pointwise convolution and a GELU": (
        "pointwise_layer", (1, 7, 9), {"normed": False, "channels": 32, "outputs": 16},
    ),
    **{form: ("feed_forward_layer", (2, 3, 5), {"form": form}) for form in ("mlp", "leffn", "leff", "mix", "gdfn")},
    "conv_ffn": ("feed_forward_layer", (2, 3, 5), {"form": "conv_ffn", "kernel": 5}),
    "sgfn": ("feed_forward_layer", (2, 3, 5), {"form": "sgfn", "bias": False}),
}  # fmt: skip


def test_views_of_one_map():
    """q, k and v along the channels of one map are within the rule, as three maps are, on every backend."""
    for call, fields in (("window_attention", {}), ("channel_attention", {})):
        operator, builder, defaults = CALLS[call]
        tensors, options = builder(2, 1, 3, **{**defaults, **fields})
        tensors = cast(tensors, torch.float32)
        qkv = torch.cat([tensors[name] for name in "qkv"], dim=1).contiguous(memory_format=torch.channels_last)
        views = {**tensors, **dict(zip("qkv", qkv.chunk(3, dim=1), strict=True))}
        grad = torch.randn(tensors["q"].shape, device=qkv.device)
        truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
        for backend in runnable(operator, tensors, options)[1:]:
            assert_within_rule(on_backend(backend, operator, views, options, grad), truth, base)


@pytest.mark.parametrize("call", ["depthwise_layer", "pointwise_layer", "pointwise_layer/no_norm"])
def test_a_view_of_channels(call):
    """Some of the channels of a map are within the rule, as a map of their own is."""
    operator, builder, fields = CALLS[call]
    tensors, options = builder(2, 5, 6, **fields)
    tensors = cast(tensors, torch.float32)
    wide = torch.cat([tensors["x"]] * 3, dim=1).contiguous(memory_format=torch.channels_last)
    view = {**tensors, "x": wide.chunk(3, dim=1)[2]}
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options)[1:]:
        assert_within_rule(on_backend(backend, operator, view, options, grad), truth, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_options(case, dtype):
    call, shape, fields = CASES[case]
    operator, builder, defaults = CALLS[call]
    tensors, options = builder(*shape, **{**defaults, **fields})
    tensors = cast(tensors, dtype)
    with ipt_fast.use_backend("reference"):
        grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options)[1:]:  # not "auto", which is one of them
        assert_within_rule(on_backend(backend, operator, tensors, options, grad), truth, base)
