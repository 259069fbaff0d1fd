"""Channel attention and its layer in every kind of group, on small maps that the groups do not divide."""

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.ops import _cpu
from ipt_fast.ops._operator import OPERATORS
from tests.ops.cases import CALLS, assert_within_rule, baseline, cast, exact, forward_and_gradients
from tests.ops.test_parity import gradient_of_output

pytestmark = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMAGE = {}
WINDOWS = {"window_size": (4, 3)}
ROWS = {"window_size": (1, 5)}
OVERLAP_OF_ONE = {"window_size": (4, 5), "overlapping": True}  # rows: two windows of 7 share one
OVERLAP_OF_NEARLY_ALL = {"window_size": (6, 8), "overlapping": True}  # of 7 and of 9
OVERLAP_OF_SOME = {"window_size": (3, 2), "overlapping": True}  # three and five windows
OVERLAP_ACROSS = {"window_size": (20, 4), "overlapping": True}  # columns only
GRID = {"dilation": 2}
LARGE_GRID = {"dilation": 8}  # more than the map's rows: some groups are empty, most are one pixel
PIXELS = {"dilation": 50}
GROUPS = [
    *(IMAGE, WINDOWS, ROWS, OVERLAP_OF_ONE, OVERLAP_OF_NEARLY_ALL, OVERLAP_OF_SOME, OVERLAP_ACROSS),
    *(GRID, LARGE_GRID, PIXELS),
]
_, channel_attention, _ = CALLS["channel_attention"]
_, channel_attention_layer, _ = CALLS["channel_attention_layer"]
SMALL = [(1, 1, 1), (1, 1, 6), (2, 3, 2)]


def check(operator, tensors, options, dtype):
    tensors = cast(tensors, dtype)
    grad = gradient_of_output(operator, tensors, options)
    with ipt_fast.use_backend("cpu"):
        found = forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)
    assert_within_rule(found, exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_attention(groups, dtype):
    for shape in [(2, 7, 9), *SMALL]:
        tensors, options = channel_attention(*shape)
        check("channel_attention", tensors, {**options, **groups, "window_size": groups.get("window_size")}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_layer(groups, dtype):
    for shape in [(2, 7, 9), *SMALL]:
        tensors, options = channel_attention_layer(*shape, **groups)
        check("channel_attention_layer", tensors, options, dtype)


OPTIONS = [
    {"bias": False},
    {"depthwise": False},
    {"depthwise": False, "bias": False},
    {"residual": False},
    {"heads": 3, "depth": 17},  # C = 51, and heads of more than one vector
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_options_of_the_layer(fields, dtype):
    for groups in (IMAGE, OVERLAP_OF_SOME, GRID):
        residual = {"residual": fields["residual"]} if "residual" in fields else {}
        others = {name: value for name, value in fields.items() if name != "residual"}
        tensors, options = channel_attention_layer(1, 7, 9, **others, **groups)
        check("channel_attention_layer", tensors, {**options, **residual}, dtype)


ADDITIONS = ["qkv_bias", "depthwise_bias", "project_bias", "gate", "norm_bias"]


@pytest.mark.parametrize("name", ADDITIONS)
def test_each_addition_alone(name):
    tensors, options = channel_attention_layer(1, 5, 6)
    absent = [each for each in ADDITIONS if each != name]
    tensors = {key: value for key, value in tensors.items() if key not in absent}
    no_bias = {} if name == "norm_bias" else {"norm_bias": None}
    check("channel_attention_layer", tensors, options | no_bias, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_zeros(groups, dtype):
    """A group of zeros gives zeros, and finite gradients."""
    tensors, options = channel_attention(1, 7, 9)
    tensors = {name: torch.zeros_like(value) if name in "qkv" else value for name, value in tensors.items()}
    options |= {**groups, "window_size": groups.get("window_size")}
    leaves = {name: value.requires_grad_() for name, value in cast(tensors, dtype).items()}
    with ipt_fast.use_backend("cpu"):
        out = ipt_fast.ops.channel_attention(**leaves, **options)
        out.sum().backward()
    assert not out.any()
    assert all(value.grad.isfinite().all() for value in leaves.values())


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_packed_and_plain_agree(groups):
    tensors, options = channel_attention_layer(2, 7, 9, **groups)
    tensors = cast(tensors, torch.float32)
    with ipt_fast.use_backend("cpu"), torch.no_grad():
        expected = ipt_fast.ops.channel_attention_layer(**tensors, **options)
    run, block, _ = _cpu.pack(OPERATORS["channel_attention_layer"], {**tensors, **options}, torch.float32)
    assert torch.equal(run(tensors["x"], block), expected)


def test_an_image_of_one_group_is_larger_than_its_blocks():
    """Sums of many blocks, and attention and projection as one product."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors, options = channel_attention_layer(2, 37, 70, heads=2, depth=20)
        check("channel_attention_layer", tensors, options, dtype)
