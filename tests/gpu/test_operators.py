"""The Triton kernels on a GPU at the models' widths; tests/ops runs there too, with IPT_FAST_TEST_DEVICE=cuda."""

import sys

import pytest
import torch

import ipt_fast
from ipt_fast.ops._operator import OPERATORS
from tests.gpu.cases import SIZES, build
from tests.ops.cases import CALLS, IMAGE_CALLS, assert_within_rule, baseline, exact, forward_and_gradients, public
from tests.ops.cases import build as build_small

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_triton(operator, tensors, options, grad):
    with ipt_fast.use_backend("triton"):
        return forward_and_gradients(getattr(ipt_fast.ops, operator), tensors, options, grad)


def upstream(operator, tensors, options):
    out = public(operator, tensors, options)
    return torch.randn_like(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_parity(name, dtype):
    operator, tensors, options = build(name, dtype)
    grad = upstream(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    assert_within_rule(on_triton(operator, tensors, options, grad), truth, base)


@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_bitwise_reproducible(name):
    operator, tensors, options = build(name, torch.bfloat16)
    grad = upstream(operator, tensors, options)
    first = on_triton(operator, tensors, options, grad)
    for _ in range(3):
        again = on_triton(operator, tensors, options, grad)
        assert all(torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.parametrize("call", CALLS)
def test_auto_takes_triton(call):
    operator, tensors, options = build_small(call, (1, 5, 6), torch.bfloat16)
    table = ipt_fast.explain(operator, **tensors, **options)[operator]
    assert table["triton"] is None, table["triton"]


@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_other_streams(call):
    operator, tensors, options = build_small(call, (2, 9, 11), torch.float32)
    expected = public(operator, tensors, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = public(operator, tensors, options)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@pytest.mark.parametrize("call", IMAGE_CALLS)
def test_other_device(call):
    operator, tensors, options = build_small(call, (2, 9, 11), torch.float32)
    moved = {name: value.to("cuda:1") for name, value in tensors.items()}
    assert torch.equal(public(operator, moved, options).cpu(), public(operator, tensors, options).cpu())


def compiled_kernels():
    """How many variants of Triton kernels this process has compiled."""
    from triton.runtime.jit import JITFunction

    # Not the package's attributes: functions there have the names of modules.
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("ipt_fast.kernels.")]
    functions = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    assert functions
    return sum(len(cache[0]) for function in functions for cache in function.device_caches.values())


MODULATED = [call for call in CALLS if call.endswith("/modulated")]


@pytest.mark.parametrize("call", [*sorted(set(OPERATORS) - {"merge_pointwise", "merge_depthwise"}), *MODULATED])
def test_a_new_image_size_compiles_nothing(call):
    def run(*size):
        name, tensors, options = build_small(call, size, torch.bfloat16)
        on_triton(name, tensors, options, upstream(name, tensors, options))

    # Both kinds of sizes: multiples of 16, which Triton treats apart, and others.
    for size in [(1, 32, 32), (1, 33, 35), (2, 32, 33), (2, 33, 32)]:
        run(*size)
    before = compiled_kernels()
    for size in [(1, 48, 64), (3, 41, 77), (2, 64, 37)]:
        run(*size)
    assert compiled_kernels() == before
