"""A wrong argument raises before anything runs; the message names the argument and what came."""

import inspect
import re

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.ops._operator import OPERATORS as REGISTRY
from tests.ops.cases import IMAGE_CALLS, ON_TOKENS, OPERATORS, build, public


def rejected(operator, tensors, options, name, error=(ValueError, TypeError)):
    with pytest.raises(error, match=rf"{operator}.*\b{re.escape(name)}\b"):
        public(operator, tensors, options)


EACH = [(operator, name) for operator in OPERATORS for name in build(operator)[1]]


@pytest.mark.parametrize(("operator", "name"), EACH)
def test_not_a_tensor(operator, name):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    for value in ("text", 3, tensors[name].numpy(), [tensors[name]]):
        rejected(operator, tensors | {name: value}, options, name, TypeError)


@pytest.mark.parametrize(("operator", "name"), [(o, n) for o, n in EACH if n not in REGISTRY[o].optional])
def test_none_where_a_tensor_is_needed(operator, name):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    rejected(operator, tensors | {name: None}, options, name, TypeError)


@pytest.mark.parametrize(("operator", "name"), EACH)
def test_dtypes(operator, name):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        rejected(operator, tensors | {name: tensors[name].to(dtype)}, options, name, TypeError)
    if name != next(iter(tensors)) and name != "branch":  # which may come from autocast's products
        for dtype in (torch.float64, torch.float16):
            rejected(operator, tensors | {name: tensors[name].to(dtype)}, options, name, TypeError)


@pytest.mark.parametrize(("call", "dtype"), [("leffn", torch.bfloat16), ("channel_attention", torch.float16)])
def test_images_and_weights_of_two_dtypes(call, dtype):
    operator, tensors, options = build(call, (2, 5, 6), torch.float32)
    first, second, *_ = tensors
    rejected(operator, tensors | {first: tensors[first].to(dtype)}, options, second, TypeError)


@pytest.mark.parametrize(("operator", "name"), EACH)
def test_devices(operator, name):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    with pytest.raises(ValueError, match="meta") as caught:
        public(operator, tensors | {name: tensors[name].to("meta")}, options)
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize(("operator", "name"), EACH)
def test_rank(operator, name):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    for value in (tensors[name][0], tensors[name][None]):
        with pytest.raises(ValueError, match=rf"{operator}.*{re.escape(str(tuple(value.shape)))}"):
            public(operator, tensors | {name: value}, options)


@pytest.mark.parametrize(("operator", "name"), EACH)
def test_one_entry_too_many_along_each_axis(operator, name):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    for axis in range(tensors[name].dim()):
        value = torch.cat([tensors[name], tensors[name].narrow(axis, 0, 1)], axis)
        allowed = name in ("x", "qkv") and axis != 1 and operator not in ON_TOKENS
        allowed |= (operator, name, axis) in [
            ("norm_projection", "x", 0),
            *((o, n, a) for o in ("norm_projection", "add_norm_projection") for n, a in (("weight", 0), ("offset", 1))),
            ("leffn", "project_weight", 0),
            ("merge_pointwise", "second", 0),
            ("merge_pointwise", "first", 1),
        ]
        if not allowed:
            with pytest.raises(ValueError, match=operator):
                public(operator, tensors | {name: value}, options)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_empty_channels_height_or_width(call, axis):
    operator, tensors, options = build(call, (2, 5, 6), torch.float32)
    name = next(iter(tensors))
    empty = {n: value.narrow(axis, 0, 0) if n in "qkv" or n == name else value for n, value in tensors.items()}
    rejected(operator, empty, options, name, ValueError)


@pytest.mark.parametrize(
    ("operator", "name", "axis"),
    [("leffn", "expand_weight", 0), ("leffn", "project_weight", 0), ("merge_pointwise", "first", 0)]
    + [("merge_pointwise", "second", 0), ("merge_depthwise", "k5", 0)],
)
def test_empty_weights(operator, name, axis):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    rejected(operator, tensors | {name: tensors[name].narrow(axis, 0, 0)}, options, name, ValueError)


@pytest.mark.parametrize("operator", ["channel_attention", "focal_channel_attention", "grid_attention"])
def test_heads(operator):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    for heads in (4, 0, -2, 7):  # 6 channels
        rejected(operator, tensors, options | {"num_heads": heads}, "num_heads", ValueError)
    for heads in (2.0, "2", None, True):
        rejected(operator, tensors, options | {"num_heads": heads}, "num_heads", TypeError)


@pytest.mark.parametrize(
    ("operator", "name"),
    [("channel_attention", "window_size"), ("focal_channel_attention", "window_size"), ("grid_attention", "grid_size")],
)
def test_window_and_grid_size(operator, name):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    for size in (0, -4):
        rejected(operator, tensors, options | {name: size}, name, ValueError)
    for size in (4.0, "4", False, (4, 4, 4) if operator == "channel_attention" else (4, 4)):
        rejected(operator, tensors, options | {name: size}, name, TypeError)


def test_channels_of_qkv_must_be_a_multiple_of_three():
    for operator in ("focal_channel_attention", "grid_attention"):
        _, tensors, options = build(operator, (2, 5, 6), torch.float32)
        rejected(operator, tensors | {"qkv": tensors["qkv"][:, :17]}, options, "qkv", ValueError)


@pytest.mark.parametrize("operator", ["channel_attention", "focal_channel_attention"])
def test_both_shapes_of_temperature(operator):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    expected = public(operator, tensors, options)
    column = tensors["temperature"].reshape(-1, 1, 1).clone().requires_grad_()
    out = public(operator, tensors | {"temperature": column}, options)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert column.grad.shape == (2, 1, 1)
    for shape in [(1, 2), (2, 1), (1, 2, 1, 1), (1,), ()]:
        value = torch.ones(shape)
        rejected(operator, tensors | {"temperature": value}, options, "temperature", ValueError)


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan")])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match=r"layer_norm_2d.*\beps\b"):
        ipt_fast.ops.layer_norm_2d(torch.ones(1, 2, 3, 3), torch.ones(2), eps=eps)


# The others have no kernels of ours on the CPU.
WITH_EPS = [operator for operator in OPERATORS if "eps" in build(operator)[2] and operator not in ON_TOKENS]


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), float("inf")])
@pytest.mark.parametrize("operator", WITH_EPS)
def test_kernels_refuse_eps_too(operator, eps):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    kernels = torch.ops.ipt_fast_cpu
    names = [argument.name for argument in getattr(kernels, operator).default._schema.arguments]
    parameters = inspect.signature(getattr(ipt_fast.ops, operator)).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    arguments = {**dict.fromkeys(names), **defaults, **tensors, **options, "eps": 1e-5}
    grad = getattr(kernels, operator)(**arguments)
    with pytest.raises(ValueError, match=r"\beps\b"):
        getattr(kernels, operator)(**arguments | {"eps": eps})
    with pytest.raises(ValueError, match=r"\beps\b"):
        getattr(kernels, f"{operator}_backward")(grad=grad, **arguments | {"eps": eps})


@pytest.mark.parametrize("eps", ["small", None, [1e-5]])
def test_eps_must_be_a_number(eps):
    with pytest.raises(TypeError, match=r"\beps\b"):
        ipt_fast.ops.layer_norm_2d(torch.ones(1, 2, 3, 3), torch.ones(2), eps=eps)


@pytest.mark.parametrize("value", ["yes", None, 0.5])
def test_flags_must_be_bool(value):
    with pytest.raises(TypeError, match=r"\bcentered\b"):
        ipt_fast.ops.layer_norm_2d(torch.ones(1, 2, 3, 3), torch.ones(2), centered=value)
    _, tensors, _ = build("merge_depthwise", dtype=torch.float32)
    with pytest.raises(TypeError, match=r"\bidentity\b"):
        ipt_fast.ops.merge_depthwise(**tensors, identity=value)


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        ipt_fast.ops.grid_attention(torch.ones(1, 6, 3, 3), None, 1, 2)
    with pytest.raises(TypeError):
        ipt_fast.ops.layer_norm_2d(torch.ones(1, 2, 3, 3), torch.ones(2), None, 1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_depthwise_kernels_are_square_and_odd(size):
    _, tensors, options = build("leffn", (2, 5, 6), torch.float32)
    for kernel in [(size, size), (3, 5), (5, 3)]:
        bad = tensors | {"depthwise_weight": torch.ones(11, 1, *kernel)}
        rejected("leffn", bad, options, "depthwise_weight", ValueError)


@pytest.mark.parametrize("kernel", [(1, 1), (5, 5), (3, 1)])
def test_dense_convolutions_are_of_three_by_three_taps(kernel):
    _, tensors, options = build("dense_convolution", (2, 5, 6), torch.float32)
    bad = tensors | {"weight": torch.ones(7, 5, *kernel)}
    rejected("dense_convolution", bad, options, "weight", ValueError)


@pytest.mark.parametrize("activation", ["relu", "GELU", "", None])
@pytest.mark.parametrize("operator", ["dense_convolution", "depthwise_layer", "pointwise_layer"])
def test_activations_that_are_not_known(operator, activation):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    rejected(operator, tensors, options | {"activation": activation}, "activation", ValueError)


@pytest.mark.parametrize("operator", ["depthwise_layer", "pointwise_layer"])
def test_a_bias_of_a_norm_that_is_absent(operator):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    rejected(operator, tensors | {"norm_weight": None}, options, "norm_bias", ValueError)


@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_nan_stays_visible(call):
    """NaN in an image is no error of the caller's types: it must come out, not vanish."""
    operator, tensors, options = build(call, (1, 5, 6), torch.float32)
    for name in {"x", "v", "qkv"} & tensors.keys():
        tensors[name][0, -1, 2, 3] = float("nan")
    assert public(operator, tensors, options)[0, :, 2, 3].isnan().any()
