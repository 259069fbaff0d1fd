"""The compiled layer_norm_2d against the formula in fp64, judged by the error of plain PyTorch in the same dtype."""

import itertools

import pytest
import torch

from ipt_fast import _extension
from tests.ops.cases import assert_within_rule, baseline, error, exact

pytestmark = pytest.mark.skipif(not _extension.load(), reason=_extension.error() or "")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["out", "x", "weight", "bias"]
LEVELS = torch.ops.ipt_fast_cpu.isa_levels() if _extension.load() else []


def as_layout(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "nchw":
        return x.contiguous()
    wide = x.new_full((x.shape[0], x.shape[1], x.shape[2] + 1, 2 * x.shape[3]), float("nan"))
    wide[:, :, 1:, ::2] = x
    return wide[:, :, 1:, ::2]


def compiled(grad, x, weight, bias, eps, centered):
    """{"out": ..., and gradients by name}."""
    ops = torch.ops.ipt_fast_cpu
    out = ops.layer_norm_2d(x, weight, bias, eps, centered)
    results = dict(zip(NAMES, [out, *ops.layer_norm_2d_backward(grad, x, weight, bias, eps, centered)], strict=True))
    if bias is None:
        assert results.pop("bias").shape == (0,)
    return results


def oracle(of, grad, x, weight, bias, eps, centered):
    """``of`` is exact or baseline."""
    tensors = {"x": x, "weight": weight, **({} if bias is None else {"bias": bias})}
    return of("layer_norm_2d", tensors, {"eps": eps, "centered": centered}, grad)


def make(shape, dtype, *, with_bias, parameter_dtype=None, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    x = (torch.randn(shape, generator=generator) * scale + 0.5 * scale).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    weight = (torch.rand(channels, generator=generator) + 0.5).to(parameter_dtype or dtype)
    bias = torch.randn(channels, generator=generator).to(parameter_dtype or dtype) if with_bias else None
    return grad, x, weight, bias


def check(grad, x, weight, bias, *, eps=1e-5, centered=True):
    arguments = (grad, x, weight, bias, eps, centered)
    got = compiled(*arguments)
    expected_strides = torch.empty(x.shape, memory_format=torch.channels_last).stride()
    assert got["out"].stride() == got["x"].stride() == expected_strides
    dtypes = [x.dtype, x.dtype, weight.dtype] + ([] if bias is None else [bias.dtype])
    assert [value.dtype for value in got.values()] == dtypes
    assert_within_rule(got, oracle(exact, *arguments), oracle(baseline, *arguments))


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("IPT_FAST_CPU_ISA", request.param)
    assert _extension.isa() == request.param


@pytest.mark.parametrize("centered, with_bias", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 32, 48, 96, 100])
def test_parity(level, channels, dtype, centered, with_bias):
    # With one channel and no centring the gradient is the tiny difference of large terms: eps keeps it comparable.
    eps = 1e-5 if channels > 1 else 1.0
    shapes = [(2, channels, 7, 13), (1, channels, 1, 1), (1, channels, 16, 20)]
    layouts = itertools.cycle(itertools.product(["channels_last", "nchw", "strided"], repeat=2))
    for (x_layout, grad_layout), shape in zip(itertools.islice(layouts, 9), itertools.cycle(shapes), strict=False):
        grad, x, weight, bias = make(shape, dtype, with_bias=with_bias)
        check(as_layout(grad, grad_layout), as_layout(x, x_layout), weight, bias, eps=eps, centered=centered)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_parameters(level, dtype, centered):
    check(*make((2, 48, 9, 11), dtype, with_bias=True, parameter_dtype=torch.float32), centered=centered)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_values(level, dtype, scale, centered):
    grad, x, weight, bias = make((1, 48, 9, 11), dtype, with_bias=True, scale=scale)
    arguments = (grad, x, weight, bias, 1e-5, centered)
    got, truth = compiled(*arguments), oracle(exact, *arguments)
    # Plain PyTorch overflows here in fp16, so the rule is the rounding alone: a few units in the last place.
    for name, value in got.items():
        if truth[name].abs().max() > torch.finfo(dtype).smallest_normal / torch.finfo(dtype).eps:
            assert error(value, truth[name]) <= 4 * max(torch.finfo(dtype).eps, 1e-6), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(level, dtype):
    """The variance is that of the differences from the mean: E[x^2] - E[x]^2 would lose all digits here."""
    x = 1000 + torch.arange(32.0).reshape(1, 32, 1, 1).expand(1, 32, 5, 5) / 32 * (1 if dtype == torch.float32 else 64)
    x = x.to(dtype)
    out = torch.ops.ipt_fast_cpu.layer_norm_2d(x, torch.ones(32), None, 1e-5, True)
    truth = oracle(exact, x, x, torch.ones(32), None, 1e-5, True)["out"]
    assert error(out, truth) <= max(2e-4, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_input(level, dtype, centered):
    grad, x, weight, bias = make((1, 17, 5, 6), dtype, with_bias=True)
    arguments = (grad, torch.zeros_like(x), weight, bias, 1e-5, centered)
    got, truth = compiled(*arguments), oracle(exact, *arguments)
    assert torch.equal(got["out"], bias[:, None, None].expand_as(x))
    for name, value in got.items():
        assert error(value, truth[name]) <= 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_non_finite_values_stay_in_their_pixel(level, layout, dtype):
    _, x, weight, bias = make((1, 20, 9, 9), dtype, with_bias=True)
    clean = torch.ops.ipt_fast_cpu.layer_norm_2d(as_layout(x, layout), weight, bias, 1e-5, True)
    x[0, 3, 4, 5], x[0, 19, 8, 8] = float("nan"), float("inf")
    out = torch.ops.ipt_fast_cpu.layer_norm_2d(as_layout(x, layout), weight, bias, 1e-5, True)
    assert out[0, :, 4, 5].isnan().all() and out[0, 19, 8, 8].isnan()
    out[0, :, 4, 5], out[0, :, 8, 8] = clean[0, :, 4, 5], clean[0, :, 8, 8]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_value_is_read_and_rounded_as_pytorch_does(level, dtype):
    if dtype == torch.float32:
        values = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
        values = values[values.isfinite()]
    # One channel, not centred, eps 1, weight w: y = x * w, so the output is x scaled and rounded once.
    x = values.to(dtype).reshape(1, 1, 1, -1)
    for weight in (1.0, 0.7, 2.0**-12):
        out = torch.ops.ipt_fast_cpu.layer_norm_2d(x, torch.full((1,), weight), None, 1.0, False)
        assert torch.equal(out, (x.float() * weight).to(dtype))


def test_every_output_value_is_written(level):
    """PyTorch fills uninitialised memory with NaN in this mode: none may show through."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(4).isnan().all()
        for channels in (1, 19, 48):
            grad, x, weight, bias = make((2, channels, 5, 7), torch.float32, with_bias=True)
            assert all(t.isfinite().all() for t in compiled(grad, x, weight, bias, 1e-5, True).values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_whatever_the_threads(dtype, layout):
    grad, x, weight, bias = make((2, 48, 67, 71), dtype, with_bias=True)
    x, grad = as_layout(x, layout), as_layout(grad, layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(compiled(grad, x, weight, bias, 1e-5, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_layouts_give_the_same_bits(level):
    grad, x, weight, bias = make((2, 33, 11, 13), torch.bfloat16, with_bias=True)
    results = [
        compiled(as_layout(grad, layout), as_layout(x, layout), weight, bias, 1e-5, False)
        for layout in ("channels_last", "nchw", "strided")
    ]
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_empty_batch():
    grad, x, weight, bias = make((0, 8, 4, 4), torch.float32, with_bias=True)
    out, grad_x, grad_weight, grad_bias = compiled(grad, x, weight, bias, 1e-5, True).values()
    assert out.shape == grad_x.shape == (0, 8, 4, 4)
    assert torch.equal(grad_weight, torch.zeros(8)) and torch.equal(grad_bias, torch.zeros(8))


BAD_ARGUMENTS = [
    (ValueError, r"x must be \(B, C, H, W\) .*; got shape \[3, 4, 4\]", {"x": torch.zeros(3, 4, 4)}),
    (ValueError, r"x must be \(B, C, H, W\) with at least one channel", {"x": torch.zeros(1, 3, 0, 4)}),
    (TypeError, "x must be Float, BFloat16 or Half; got Double", {"x": torch.zeros(1, 3, 4, 4).double()}),
    (ValueError, r"weight must have shape \[3\], or \[1, 3\] of each image; got", {"weight": torch.ones(4)}),
    (ValueError, r"weight must have shape \[3\], or \[1, 3\] of each image; got", {"weight": torch.ones(3, 1)}),
    (TypeError, "weight must be Float; got Half", {"weight": torch.ones(3).half()}),
    (ValueError, r"bias must have shape \[3\], or \[1, 3\] of each image; got", {"bias": torch.ones(1)}),
    (TypeError, "bias must be Float; got Long", {"bias": torch.ones(3).long()}),
]


@pytest.mark.parametrize("exception, message, change", BAD_ARGUMENTS)
def test_bad_arguments(exception, message, change):
    arguments = {"x": torch.zeros(1, 3, 4, 4), "weight": torch.ones(3), "bias": torch.ones(3)} | change
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    with pytest.raises(exception, match=message):
        torch.ops.ipt_fast_cpu.layer_norm_2d(x, weight, bias, 1e-5, True)
    with pytest.raises(exception, match=message):
        torch.ops.ipt_fast_cpu.layer_norm_2d_backward(torch.zeros_like(x), x, weight, bias, 1e-5, True)


def test_bad_grad():
    x, weight = torch.zeros(1, 3, 4, 4), torch.ones(3)
    for exception, message, grad in [
        (ValueError, "grad must have shape", torch.zeros(1, 3, 4, 5)),
        (TypeError, "grad must be Float; got Half", torch.zeros(1, 3, 4, 4).half()),
    ]:
        with pytest.raises(exception, match=message):
            torch.ops.ipt_fast_cpu.layer_norm_2d_backward(grad, x, weight, None, 1e-5, True)


def test_best_level_is_the_default(monkeypatch):
    monkeypatch.delenv("IPT_FAST_CPU_ISA", raising=False)
    assert _extension.isa() == [level for level in LEVELS if level != "amx_fp32"][-1]  # which is on request
