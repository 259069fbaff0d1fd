"""Every operator, on every backend that runs here, against its reference in fp64."""

import os

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from tests.ops.cases import (
    CALLS,
    DEVICE,
    IMAGE_CALLS,
    IMAGES,
    MERGES,
    assert_all_within_rule,
    assert_within_rule,
    baseline,
    build,
    cast,
    error,
    exact,
    forward_and_gradients,
    public,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(2, 7, 13), (1, 16, 12), (2, 3, 2), (1, 1, 1), (1, 1, 11), (2, 17, 5)]
SIZES = SIZES[: int(os.environ.get("IPT_FAST_TEST_SIZES", len(SIZES)))]  # fewer for the interpreter, which is slow


def runnable(operator, tensors, options):
    """The backends that can run this call: all but those that `explain` gives a reason against."""
    table = ipt_fast.explain(operator, **tensors, **options)[operator]
    return ["auto", *(backend for backend, reason in table.items() if reason is None)]


def on_backend(backend, operator, tensors, options, grad):
    with ipt_fast.use_backend(backend):
        return forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)


def gradient_of_output(operator, tensors, options):
    out = public(operator, tensors, options)
    return torch.randn(out.shape).to(out)


@pytest.mark.parametrize("small_dtype", [None, torch.float32], ids=["small_same", "small_fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("call", CALLS)
def test_parity(call, dtype, small_dtype):
    by_triton = []
    for shape in SIZES if CALLS[call][0] not in MERGES else SIZES[:1]:
        operator, tensors, options = build(call, shape, dtype, small_dtype)
        grad = gradient_of_output(operator, tensors, options)
        truth = exact(operator, tensors, options, grad)
        base = baseline(operator, tensors, options, grad)
        for backend in runnable(operator, tensors, options):
            got = on_backend(backend, operator, tensors, options, grad)
            assert got["out"].dtype == dtype
            assert all(got[name].dtype == value.dtype for name, value in tensors.items())
            if backend == "triton" or got["out"].is_cuda:
                by_triton.append((got, truth, base))
            else:
                assert_within_rule(got, truth, base)
    if by_triton:
        assert_all_within_rule(by_triton)


UNUSUAL = {
    "layer_norm_2d/bias_free": [{"channels": 1}, {"channels": 2}, {"channels": 2, "centered": True}],
    "leffn": [{"kernel": 1}, {"kernel": 9}, {"hidden": 1, "channels": 1, "out": 1}],
    "leffn_layer": [{"kernel": 9}],
    "dense_convolution": [{"channels": 1, "out": 1}, {"channels": 16, "out": 32}, {"channels": 50, "out": 66}],
    "channel_attention/windows": [{"window": 1}, {"window": 100}],
    "focal_channel_attention": [{"window": 1}, {"window": 2}, {"window": 100}],
    "focal_attention_layer": [{"window": 1}, {"depth": 1}],
    "grid_attention": [{"grid": 1}, {"grid": 20}],
    "grid_attention_layer": [{"grid": 1}, {"depth": 1}],
    "window_attention": [{"window": (1, 1), "shift": (0, 0)}, {"window": (20, 15)}],
    "window_attention_layer": [{"window": (1, 1), "shift": (0, 0)}, {"depth": 1}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", UNUSUAL)
def test_unusual_sizes(call, dtype):
    """Windows of one pixel and larger than the map, convolutions of one tap and of many, single channels."""
    operator, builder, fields = CALLS[call]
    for changes in UNUSUAL[call]:
        tensors, options = builder(2, 9, 11, **{**fields, **changes})
        tensors = cast(tensors, dtype)
        grad = gradient_of_output(operator, tensors, options)
        truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
        for backend in runnable(operator, tensors, options):
            assert_within_rule(on_backend(backend, operator, tensors, options, grad), truth, base)


@pytest.mark.parametrize("call", CALLS)
def test_weights_with_strides(call):
    """Parameters that are views: every second value of a larger tensor, or with their first axes exchanged."""
    operator, tensors, options = build(call, (1, 6, 7), torch.float32)
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    moved = {name: every_second(value) for name, value in tensors.items() if name not in IMAGES}
    turned = {name: v.transpose(0, 1).contiguous().transpose(0, 1) for name, v in moved.items() if v.dim() > 1}
    for views in (moved, turned):
        for backend in runnable(operator, {**tensors, **views}, options):
            assert_within_rule(on_backend(backend, operator, {**tensors, **views}, options, grad), truth, base)


def every_second(value):
    """``value`` as a part of a tensor twice as wide, which is NaN elsewhere."""
    wide = value.new_full((*value.shape, 2), float("nan"))
    wide[..., 0] = value
    return wide[..., 0]


def test_window_maps_of_different_dtypes():
    operator, tensors, options = build("focal_channel_attention", (1, 9, 11), torch.bfloat16)
    tensors["top_weight"], tensors["temperature"] = tensors["top_weight"].float(), tensors["temperature"].float()
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options):
        got = on_backend(backend, operator, tensors, options, grad)
        assert all(got[name].dtype == value.dtype for name, value in tensors.items())
        assert_within_rule(got, truth, base)


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton's layers keep fp16 maps between kernels, as PyTorch does")
@pytest.mark.parametrize("call", ["focal_attention_layer", "leffn_layer", "grid_attention_layer"])
def test_intermediate_values_may_leave_the_range_of_fp16(call):
    """Weights that make them as large as 1e6 before the last projection makes them small again."""
    operator, tensors, options = build(call, (1, 7, 9), torch.float16)
    for name, factor in {
        "qkv_weight": 3e2,
        "expand_weight": 3e2,
        "depthwise_weight": 3e2,
        "project_weight": 1e-3,
    }.items():
        if name in tensors:
            tensors[name] = tensors[name] * (factor if name != "qkv_weight" or call[0] == "f" else 1.0)
    grad = gradient_of_output(operator, tensors, options)
    truth = exact(operator, tensors, options, grad)
    got = on_backend("auto", operator, tensors, options, grad)
    assert truth["out"].abs().max() < 6e4
    for name, value in got.items():
        if truth[name].abs().max() < 6e4:
            assert error(value, truth[name]) < 0.01, name


@pytest.mark.parametrize("scale", [1e4, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_scaled_images(call, dtype, scale):
    """Images of another scale: in fp16 plain PyTorch overflows here, an operator must not."""
    operator, tensors, options = build(call, (1, 7, 9))
    for name in IMAGES & tensors.keys():
        tensors[name] *= scale
    if operator == "grid_attention":  # scores of 1e8 would only ask which one rounding makes the largest
        tensors["qkv"][:, : tensors["qkv"].shape[1] * 2 // 3] /= scale
    if operator == "gated_projection":  # the product of two scaled images would not fit
        tensors["pixel_gate"] /= scale
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options):
        got = on_backend(backend, operator, tensors, options, grad)
        fits = {name: value for name, value in got.items() if truth[name].abs().max() < torch.finfo(dtype).max}
        assert "out" in fits
        assert_within_rule(fits, truth, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_attention_with_huge_scores_stays_finite(dtype):
    _, tensors, options = build("grid_attention", (1, 7, 9))
    tensors = {name: (value * 1e4).to(dtype) for name, value in tensors.items()}
    got = on_backend("auto", "grid_attention", tensors, options, torch.ones(1, 6, 7, 9).to(tensors["qkv"]))
    v = tensors["qkv"][:, 12:]
    assert got["out"].isfinite().all() and got["out"].abs().max() <= v.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_all_zero_images(call, dtype):
    operator, tensors, options = build(call, (2, 5, 9), dtype)
    tensors = {name: torch.zeros_like(value) if name in IMAGES else value for name, value in tensors.items()}
    for backend in runnable(operator, tensors, options):
        got = on_backend(backend, operator, tensors, options, gradient_of_output(operator, tensors, options))
        assert all(value.isfinite().all() for value in got.values())
        if {"norm_bias", "expand_bias"} & set(tensors) or "gelu" in options.values():  # what follows is not zero
            continue
        bias = tensors.get("bias") if operator in ("layer_norm_2d", "gated_projection", "pointwise_layer") else None
        expected = 0 * got["out"] if bias is None else bias[..., None, None].expand_as(got["out"])
        assert torch.equal(got["out"], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", ["focal_channel_attention", "channel_attention/windows"])
def test_one_window_of_zeros(call, dtype):
    operator, tensors, options = build(call, (1, 8, 8), dtype)
    for name in IMAGES & tensors.keys():
        tensors[name][..., :6, :6] = 0  # a whole window, and a whole shifted one
    got = on_backend("auto", operator, tensors, options, gradient_of_output(operator, tensors, options))
    assert got["out"].isfinite().all() and got["out"].any()
    assert not got["out"][..., :4, :4].any()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_empty_batch(call, dtype):
    operator, tensors, options = build(call, (0, 5, 6), dtype)
    for backend in runnable(operator, tensors, options):
        with ipt_fast.use_backend(backend):
            leaves = {name: value.requires_grad_() for name, value in tensors.items()}
            out = public(operator, leaves, options)
            assert out.shape[0] == 0 and out.shape[2:] == (5, 6) and out.dtype == dtype
            out.sum().backward()
            for name, value in leaves.items():
                assert value.grad.shape == value.shape and not value.grad.any(), name
                value.grad = None


def as_layout(x, layout):
    """The values of x in other strides; memory around them is NaN."""
    batch, channels, height, width = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = x.new_full((batch, channels + 1, height + 2, 2 * width), float("nan"))
        wide[:, 1:, 1:-1, ::2] = x
        return wide[:, 1:, 1:-1, ::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous()


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_layouts(call, dtype, layout):
    """Same results as from NCHW input, by the same rule, whatever the strides of images and of the gradient."""
    for shape in [(2, 5, 7), (1, 1, 3), (2, 1, 1)]:
        operator, tensors, options = build(call, shape, dtype)
        grad = gradient_of_output(operator, tensors, options)
        moved = {name: as_layout(value, layout) if name in IMAGES else value for name, value in tensors.items()}
        truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
        for backend in runnable(operator, tensors, options):
            got = on_backend(backend, operator, moved, options, as_layout(grad, layout))
            assert_within_rule(got, truth, base)


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
@pytest.mark.skipif(DEVICE != "cpu", reason="it is about the kernels for CPUs")
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_the_step_behind_a_single_image_is_nobodys(call):
    """Whatever stride an axis of one image has, the C++ kernels give the same bits and copy nothing more."""
    operator, tensors, options = build(call, (1, 5, 7), torch.float32)
    grad = as_layout(gradient_of_output(operator, tensors, options), "channels_last")
    usual = {name: as_layout(value, "channels_last") if name in IMAGES else value for name, value in tensors.items()}
    moved = {n: v.as_strided(v.shape, (3, *v.stride()[1:])) if n in IMAGES else v for n, v in usual.items()}
    expected, copies = copies_of(on_backend, "cpu", operator, usual, options, grad)
    got, copies_of_moved = copies_of(on_backend, "cpu", operator, moved, options, grad)
    assert copies_of_moved == copies and all(torch.equal(got[name], value) for name, value in expected.items())


def copies_of(function, *args):
    """(what it returns, how many tensors it copied to others)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = function(*args)
    return found, sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_output_and_gradients_are_exactly_channels_last(call, layout):
    for shape in [(2, 5, 7), (1, 1, 1), (1, 1, 6), (3, 4, 1), (0, 4, 4)]:
        operator, tensors, options = build(call, shape, torch.float32)
        if layout in ("channels_last", "sliced") or shape[0]:
            tensors = {n: as_layout(value, layout) if n in IMAGES else value for n, value in tensors.items()}
        for backend in runnable(operator, tensors, options):
            got = on_backend(backend, operator, tensors, options, gradient_of_output(operator, tensors, options))
            for name in {"out"} | IMAGES & tensors.keys():
                _, channels, height, width = got[name].shape
                assert got[name].stride() == (height * width * channels, 1, width * channels, channels), name


@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_expanded_images(call):
    """An image repeated by stride 0, and a gradient of output that is one expanded number."""
    operator, tensors, options = build(call, (1, 4, 5), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    expanded = {
        name: value.expand(3, *value.shape[1:]) if name in IMAGES or of_each_image(name, value) else value
        for name, value in leaves.items()
    }
    public(operator, expanded, options).sum().backward()
    expected = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    (3 * public(operator, expected, options)).sum().backward()
    for name, value in leaves.items():
        assert error_is_small(value.grad, expected[name].grad), name


def of_each_image(name, value):
    names = ("weight", "bias", "norm_weight", "norm_bias", "gate", "channel_gate")
    return value.dim() == 2 and len(value) == 1 and name in names


def error_is_small(value, truth):
    return (value - truth).abs().max() <= 1e-4 * truth.abs().max() + 1e-5


@pytest.mark.parametrize("call", ["layer_norm_2d", "channel_attention", "grid_attention", "leffn"])
def test_images_of_one_batch_do_not_mix(call):
    operator, tensors, options = build(call, (3, 6, 5), torch.float32)
    whole = public(operator, tensors, options)
    for i in range(3):
        single = {name: value[i : i + 1] if name in IMAGES else value for name, value in tensors.items()}
        torch.testing.assert_close(public(operator, single, options), whole[i : i + 1])


@pytest.mark.parametrize("call", CALLS)
def test_every_value_is_written(call):
    """PyTorch fills memory that is not initialised with NaN in this mode: none may show through."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        for shape in [(2, 7, 5), (1, 1, 1)]:
            operator, tensors, options = build(call, shape, torch.float32)
            for backend in runnable(operator, tensors, options):
                grad = gradient_of_output(operator, tensors, options)
                got = on_backend(backend, operator, tensors, options, grad)
                assert all(value.isfinite().all() for value in got.values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_left_as_they_are(call):
    operator, tensors, options = build(call, (2, 5, 6), torch.float32)
    before = {name: value.clone() for name, value in tensors.items()}
    got = on_backend("auto", operator, tensors, options, gradient_of_output(operator, tensors, options))
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    pointers = {value.data_ptr() for value in tensors.values()}
    assert not pointers & {value.data_ptr() for value in got.values()}
