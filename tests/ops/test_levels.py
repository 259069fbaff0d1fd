"""The C++ kernels at every instruction set this machine has, at sizes that cross their tiles, and on other threads."""

import pathlib
import subprocess
import sys

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from tests.ops.cases import CALLS, IMAGES, assert_within_rule, baseline, build, exact, forward_and_gradients, public
from tests.ops.test_parity import gradient_of_output
from tests.ops.test_range import ATTENTION, LAYER, check, scaled

pytestmark = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))

ROOT = pathlib.Path(__file__).parents[2]


def levels_with_emulated():
    torch.ops.ipt_fast_cpu.emulate_amx(True)
    levels = torch.ops.ipt_fast_cpu.isa_levels()
    torch.ops.ipt_fast_cpu.emulate_amx(False)
    return levels


LEVELS = levels_with_emulated() if _extension.load() else []

# fields and shapes that leave several tiles, bands, blocks and groups, and rests of each
LARGE = {
    "layer_norm_2d": ({"channels": 100}, (2, 13, 29)),
    "layer_norm_2d/bias_free": ({"channels": 48}, (1, 31, 37)),
    "layer_norm_2d/each_image": ({"channels": 100}, (3, 13, 29)),
    "channel_attention": ({"heads": 2, "depth": 33}, (2, 29, 41)),
    "channel_attention/windows": ({"heads": 2, "depth": 24, "window": 8}, (1, 37, 30)),
    "channel_attention/dilated": ({"heads": 2, "depth": 24}, (1, 50, 71)),
    "channel_attention/overlapping": ({"heads": 2, "depth": 20, "window": (16, 22)}, (1, 37, 30)),
    "channel_attention_layer": ({"heads": 2, "depth": 33}, (2, 37, 75)),
    "channel_attention_layer/bias_free": ({"heads": 1, "depth": 48}, (1, 50, 43)),
    "channel_attention_layer/windows": ({"heads": 3, "depth": 20, "window_size": (8, 16)}, (2, 34, 43)),
    "focal_channel_attention": ({"heads": 2, "depth": 32, "window": 8}, (2, 37, 45)),
    "focal_channel_attention/odd_window": ({"heads": 1, "depth": 48, "window": 7}, (1, 33, 71)),
    "focal_channel_attention/two": ({"heads": 2, "depth": 20, "window": 7}, (1, 37, 45)),
    "focal_channel_attention/released": ({"heads": 2, "depth": 32, "window": 8}, (2, 37, 45)),
    "focal_attention_layer": ({"heads": 2, "depth": 32, "window": 16}, (2, 37, 75)),
    "focal_attention_layer/bias_free": ({"heads": 3, "depth": 20, "window": 9}, (1, 50, 21)),
    "focal_attention_layer/modulated": ({"heads": 3, "depth": 28, "window": 8}, (2, 34, 43)),
    "focal_attention_layer/layer_scale": ({"heads": 2, "depth": 32, "window": 8}, (3, 16, 27)),
    "grid_attention": ({"heads": 2, "depth": 24, "grid": 8}, (2, 30, 27)),
    "grid_attention/no_bias": ({"heads": 1, "depth": 33, "grid": 5}, (1, 41, 19)),
    "grid_attention_layer": ({"heads": 2, "depth": 32, "grid": 8}, (1, 45, 33)),
    "grid_attention_layer/bias_free": ({"heads": 1, "depth": 48, "grid": 16}, (1, 35, 18)),
    "grid_attention_layer/modulated": ({"heads": 3, "depth": 28, "grid": 8}, (2, 35, 43)),
    "grid_attention_layer/layer_scale": ({"heads": 2, "depth": 32, "grid": 8}, (3, 16, 27)),
    "window_attention": ({"depth": 10, "window": (8, 8), "shift": (4, 4)}, (2, 21, 18)),
    "window_attention/overlapping": ({"depth": 30, "window": (8, 8), "keys": (12, 12)}, (1, 17, 20)),
    "window_attention/cosine": ({"depth": 16, "window": (12, 8), "shift": (6, 4)}, (1, 25, 19)),
    "window_attention_layer": ({"heads": 3, "depth": 10, "window": (8, 8), "shift": (4, 4)}, (2, 21, 18)),
    "window_attention_layer/bias_free": ({"heads": 2, "depth": 30, "window": (16, 16)}, (1, 35, 18)),
    "leffn": ({"channels": 48, "hidden": 100, "out": 40}, (2, 23, 75)),
    "leffn/3x3": ({"channels": 20, "hidden": 70, "out": 33}, (1, 9, 150)),
    "leffn/biases": ({"channels": 48, "hidden": 100, "out": 40}, (2, 35, 75)),
    "leffn_layer": ({"channels": 64, "hidden": 256}, (1, 21, 130)),
    "leffn_layer/bias_free": ({"channels": 33, "hidden": 130, "kernel": 7}, (2, 19, 35)),
    "leffn_layer/modulated": ({"channels": 33, "hidden": 130}, (3, 37, 70)),
    "leffn_layer/layer_scale": ({"channels": 64, "hidden": 256, "kernel": 3}, (2, 11, 40)),
    "depthwise_layer": ({"channels": 60}, (2, 13, 75)),
    "depthwise_layer/bias_free": ({"channels": 120, "kernel": 5}, (1, 11, 120)),
    "depthwise_layer/no_norm": ({"channels": 33, "normed": False, "activation": "none"}, (2, 9, 40)),
    "gated_projection": ({"channels": 60, "outputs": 60}, (2, 13, 35)),
    "gated_projection/each_image": ({"channels": 230, "outputs": 100}, (3, 9, 40)),
    "pointwise_layer": ({"channels": 60, "outputs": 180}, (2, 13, 35)),
    "pointwise_layer/bias_free": ({"channels": 96, "outputs": 16, "each_image": True}, (3, 9, 40)),
    "pointwise_layer/no_norm": ({"channels": 180, "outputs": 33, "activation": "gelu"}, (1, 11, 75)),
    "dense_convolution": ({"channels": 60, "out": 90}, (2, 37, 43)),
    "dense_convolution/plain": ({"channels": 33, "out": 45}, (1, 29, 150)),
    "feed_forward_layer": ({"channels": 60, "hidden": 120}, (2, 13, 35)),
    "feed_forward_layer/gdfn": ({"channels": 48, "hidden": 254}, (1, 11, 75)),
    "feed_forward_layer/sgfn": ({"channels": 33, "hidden": 140}, (2, 9, 40)),
}


def large(call, dtype):
    operator, builder, fields = CALLS[call]
    changes, shape = LARGE.get(call, ({}, (2, 7, 9)))
    tensors, options = builder(*shape, **{**fields, **changes})
    return operator, {name: value.to(dtype) for name, value in tensors.items()}, options


def on_cpu(operator, tensors, options, grad):
    with ipt_fast.use_backend("cpu"):
        return forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A level with a matrix unit has the vectors of another, and computes on the unit bfloat16 only, or float32, too.
OF_THE_UNIT = {"amx": DTYPES[1:2], "amx_fp32": DTYPES[::2]}
LEVELS_AND_DTYPES = [(level, dtype) for level in LEVELS for dtype in OF_THE_UNIT.get(level, DTYPES)]


@pytest.fixture
def level(request, monkeypatch):
    emulate = request.param not in torch.ops.ipt_fast_cpu.isa_levels()
    monkeypatch.setenv("IPT_FAST_CPU_ISA", request.param)
    torch.ops.ipt_fast_cpu.emulate_amx(emulate)
    assert _extension.isa() == request.param
    yield request.param
    torch.ops.ipt_fast_cpu.emulate_amx(False)


@pytest.mark.parametrize(("level", "dtype"), LEVELS_AND_DTYPES, indirect=["level"])
@pytest.mark.parametrize("call", CALLS)
def test_every_level(call, dtype, level):
    for operator, tensors, options in (build(call, (2, 7, 5), dtype), large(call, dtype)):
        grad = gradient_of_output(operator, tensors, options)
        truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
        assert_within_rule(on_cpu(operator, tensors, options, grad), truth, base)


@pytest.mark.parametrize("scale", [1e-20, 1e18, 1e25])
@pytest.mark.parametrize(
    ("level", "dtype"), [pair for pair in LEVELS_AND_DTYPES if pair[1] != torch.float16], indirect=["level"]
)
@pytest.mark.parametrize("call", [*ATTENTION, LAYER])
def test_range_at_every_level(call, dtype, level, scale):
    operator, tensors, options = large(call, torch.float64)
    scaled("mixed", tensors, scale)
    check(operator, tensors, options, dtype, ["cpu"])


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize(
    "call", [call for call in CALLS if any(kind in call for kind in ("attention", "leffn", "feed_forward_layer"))]
)
def test_flat_images_at_every_level(call, level):
    """Where all tokens are equal, parts of a gradient cancel, however products round their factors."""
    operator, tensors, options = build(call, (1, 8, 9), torch.bfloat16)
    for name, value in tensors.items():
        if name in IMAGES:
            tensors[name] = value[..., :1, :1].expand_as(value).contiguous()
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    assert_within_rule(on_cpu(operator, tensors, options, grad), truth, base)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_threads(call, dtype, threads):
    """By the rule at 1, 2 and 5 threads; bit for bit the same again at the same number."""
    operator, tensors, options = large(call, dtype)
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for count in (1, 2, 5):
        threads(count)
        first = on_cpu(operator, tensors, options, grad)
        assert_within_rule(first, truth, base)
        again = on_cpu(operator, tensors, options, grad)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_level_that_does_not_exist_is_an_error_also_in_mid_call():
    """The level is read once a call: changing it meanwhile must not end the process."""
    program = """
import os, threading, torch, ipt_fast
from tests.ops.cases import build
layers = []
for name in ("leffn_layer", "focal_attention_layer", "grid_attention_layer"):
    operator, tensors, options = build(name, (1, 40, 40))
    tensors = {key: None if value is None else value.bfloat16() for key, value in tensors.items()}
    layers.append((getattr(ipt_fast.ops, operator), tensors | options))
stop = threading.Event()
def flip():
    while not stop.is_set():
        for level in [*torch.ops.ipt_fast_cpu.isa_levels(), "nonsense"]:
            os.environ["IPT_FAST_CPU_ISA"] = level
thread = threading.Thread(target=flip, daemon=True)
thread.start()
errors = 0
for _ in range(200):
    for layer, arguments in layers:
        try:
            layer(**arguments)
        except ValueError:
            errors += 1
stop.set()
thread.join()
print("alive", errors)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("alive"), done.stderr


@pytest.mark.parametrize("call", CALLS)
def test_a_weight_written_without_notice_is_followed(call):
    """Kernels pack weights; a write through .data does not even move a tensor's version counter."""
    operator, tensors, options = build(call, (2, 7, 9), torch.float32)
    for name, value in tensors.items():
        parameter = torch.nn.Parameter(value.clone())
        changed = {**tensors, name: parameter}

        def output(changed=changed):
            with ipt_fast.use_backend("cpu"), torch.no_grad():
                return public(operator, changed, options)

        before, version = output(), parameter._version
        parameter.data.mul_(1.5)
        assert parameter._version == version
        with ipt_fast.use_backend("reference"), torch.no_grad():
            expected = public(operator, changed, options)
        torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-4)
        if name not in ("q", "k", "qkv"):  # normalised, or only in part
            assert not torch.equal(output(), before)
