"""The CUDA kernels on CPU tensors, emulated: run by test_emulated.py, with IPT_FAST_EMULATED_CUDA set."""

import pytest
import torch
import torch.nn.functional as F

import ipt_fast
from ipt_fast import _extension, reference
from ipt_fast.ops._operator import OPERATORS
from tests.cuda.cases import SIZES, build
from tests.ops.cases import CALLS, IMAGES, assert_within_rule, baseline, exact, forward_and_gradients
from tests.ops.test_range import scaled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_cuda(operator, tensors, options):
    with ipt_fast.use_backend("cuda"), torch.no_grad():
        return getattr(ipt_fast.ops, operator)(**tensors, **options)


def forward_errors(operator, tensors, options, got):
    """`got` judged by the rule; gradients are the business of other backends."""
    truth = exact(operator, tensors, options, torch.ones_like(got))
    base = baseline(operator, tensors, options, torch.ones_like(got))
    assert_within_rule({"out": got}, truth, base)


def test_every_operator_is_called_here():
    """Only a call tells whether a function of the library has the arguments of its operator's schema."""
    assert _extension.cuda_error() is None
    defined = {name for name in OPERATORS if hasattr(torch.ops.ipt_fast_cuda, name)}
    assert defined == {CALLS[call][0] for call, *_ in SIZES.values()}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", SIZES)
def test_parity_in_both_orders_of_threads(name, dtype):
    operator, tensors, options = build(name, dtype)
    before = {key: value.clone() for key, value in tensors.items()}
    got = on_cuda(operator, tensors, options)
    forward_errors(operator, tensors, options, got)
    assert all(torch.equal(value, before[key]) for key, value in tensors.items())
    torch.ops.ipt_fast_cuda.set_reversed(True)
    try:
        assert torch.equal(on_cuda(operator, tensors, options), got)
    finally:
        torch.ops.ipt_fast_cuda.set_reversed(False)


@pytest.mark.parametrize("scale", [1e-20, 1e18, 1e25, 1e37])
@pytest.mark.parametrize("part", ["all", "a_row"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["focal layer 64", "focal layer 48, odd window"])
def test_range(name, dtype, part, scale):
    """Values as large and as small as their dtype holds."""
    operator, tensors, options = build(name, torch.float64, torch.float64)
    scaled(part, tensors, scale)
    most = torch.finfo(dtype).max
    tensors = {key: value.clamp(-most, most).to(dtype) for key, value in tensors.items()}
    got = on_cuda(operator, tensors, options)
    grad = torch.ones_like(got)
    truth = exact(operator, tensors, options, grad)["out"]
    plain = forward_and_gradients(getattr(reference, operator).formula, tensors, options, grad)["out"]
    finite = plain.isfinite() & (truth.abs() < most / 8)  # parts of a sum may be larger
    assert got[finite].isfinite().all()
    if finite.all():
        assert_within_rule({"out": got}, {"out": truth}, baseline(operator, tensors, options, grad))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SIZES)
def test_small_parameters_in_the_dtype_of_the_image(name, dtype):
    operator, tensors, options = build(name, dtype, dtype)
    got = on_cuda(operator, tensors, options)
    forward_errors(operator, tensors, options, got)
    small = [key for key in tensors if tensors[key].dim() < 4]
    for wide in (small, small[:1]):  # all in float32, and one of them
        same = {key: value.float() if key in wide else value for key, value in tensors.items()}
        assert torch.equal(on_cuda(operator, same, options), got)


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("name", SIZES)
def test_tf32(name):
    operator, tensors, options = build(name, torch.float32)
    got = on_cuda(operator, tensors, options)
    truth = exact(operator, tensors, options, torch.ones_like(got))["out"]
    assert (got - truth).abs().max() < 4e-3 * truth.abs().max()  # operands of 11 bits


@pytest.mark.parametrize("name", [name for name in SIZES if not name.startswith("merge")])
def test_an_empty_batch_and_nan(name):
    operator, tensors, options = build(name, torch.float32)
    image = next(key for key in tensors if key in IMAGES)
    empty = {**tensors, image: tensors[image][:0]}
    assert on_cuda(operator, empty, options).shape[0] == 0
    tensors[image][-1, 0, 0, 0] = float("nan")
    got = on_cuda(operator, tensors, options)
    with ipt_fast.use_backend("reference"), torch.no_grad():
        plain = getattr(ipt_fast.ops, operator)(**tensors, **options)
    assert torch.equal(got.isnan(), plain.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("merge")])
def test_gradients_of_merges(name, dtype):
    operator, tensors, options = build(name, dtype)
    grad = torch.randn_like(on_cuda(operator, tensors, options))
    with ipt_fast.use_backend("cuda"):
        got = forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)
    assert_within_rule(got, exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad))


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("merge")])
def test_gradients_of_merges_from_a_slice(name):
    """Gradients may begin anywhere in memory."""
    operator, tensors, options = build(name, torch.float32)
    inputs = {key: value.requires_grad_() for key, value in tensors.items()}
    with ipt_fast.use_backend("cuda"):
        merged = getattr(ipt_fast.ops, operator)(**inputs, **options)
        torch.cat([torch.zeros(1), merged.flatten()]).square().sum().backward()
    got = [value.grad for value in inputs.values()]
    with ipt_fast.use_backend("reference"):
        merged = getattr(ipt_fast.ops, operator)(**inputs, **options)
    expected = torch.autograd.grad(merged.square().sum(), list(inputs.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_in_16_bits_stays_in_the_patches_that_see_it(dtype):
    operator, tensors, options = build("leffn 32", dtype)
    tensors["x"][0, 0, 6, 5] = float("nan")
    got = on_cuda(operator, tensors, options).isnan().any(1)[0]
    seen = torch.zeros_like(got)
    seen[4:9, 3:8] = True  # 5 x 5 around it
    patches = F.max_pool2d(seen[None, None].float(), 4, ceil_mode=True)
    allowed = F.interpolate(patches, scale_factor=4)[0, 0, : got.shape[0], : got.shape[1]] > 0
    assert (got | seen == got).all() and not (got & ~allowed).any()


def test_whatever_the_library_refuses_has_a_reason():
    operator, tensors, options = build("focal layer 32", torch.float32)
    maps = {
        name: torch.ones(1, 1, 1).expand(1, 16400, 16400) for name in ("token_weight", "top_weight", "bottom_weight")
    }
    reason = ipt_fast.explain(operator, **{**tensors, **maps}, **{**options, "window_size": 16400})[operator]["cuda"]
    assert reason == "the CUDA kernels take windows of up to 16384 pixels; this is 16400"


def test_a_gradient_of_another_backend():
    operator, tensors, options = build("leffn layer 32", torch.float32)
    grad = torch.randn_like(tensors["x"])
    with ipt_fast.use_backend("cuda"):
        got = forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)
    assert_within_rule(got, exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad))
