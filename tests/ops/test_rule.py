"""The error rule itself: what other machines may make of a formula passes, what is a little wrong does not."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ipt_fast import reference
from tests.ops.cases import CALLS, MERGES, assert_within_rule, baseline, build, exact, forward_and_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRODUCTS = {torch.Tensor.__matmul__, torch.conv2d}
WITH_PRODUCTS = [call for call, (operator, *_) in CALLS.items() if operator not in MERGES | {"layer_norm_2d"}]
LAYERS = [call for call in CALLS if "_layer" in call]


class Products(TorchFunctionMode):
    """Replaces (a, b) of every matrix product and (image, weight) of every convolution by ``change`` of them."""

    def __init__(self, change):
        self.change = change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            depthwise = func is torch.conv2d and (kwargs or {}).get("groups", 1) > 1
            axes = None if depthwise else (1, 1) if func is torch.conv2d else (-1, -2)
            args = *self.change(*args[:2], axes), *args[2:]
        return func(*args, **(kwargs or {}))


def reversed_sums(a, b, axes):
    return (a, b) if axes is None else (a.flip(axes[0]), b.flip(axes[1]))


def last_term_dropped(a, b, axes):
    if axes is None or a.shape[axes[0]] == 1:
        return a, b
    return tuple(t.narrow(axis, 0, t.shape[axis] - 1) for t, axis in zip((a, b), axes, strict=True))


def one_tap_dropped(a, b, axes):
    if axes is not None:
        return a, b
    taps = torch.ones(b.shape[-2:], dtype=b.dtype)
    taps[0, -1] = 0
    return a, b * taps


def rounded(value, bits):
    """To so many bits of mantissa, as operands of a matrix unit; gradients pass."""
    mantissa, exponent = torch.frexp(value.detach())
    return value + (torch.ldexp(torch.round(torch.ldexp(mantissa, bits)), exponent - bits) - value.detach())


def in_bfloat16(a, b, _):
    return rounded(a, 8), rounded(b, 8)


def in_tf32(a, b, _):
    return rounded(a, 11), rounded(b, 11)


class Prepared:
    """A call with what the rule needs to judge its results."""

    def __init__(self, call, dtype, shape=(2, 7, 13)):
        self.operator, self.tensors, self.options = build(call, shape, dtype)
        self.formula = getattr(reference, self.operator).formula
        out = self.formula(**self.tensors, **self.options)
        self.grad = torch.randn(out.shape).to(dtype)
        arguments = self.operator, self.tensors, self.options, self.grad
        self.truth, self.base = exact(*arguments), baseline(*arguments)

    def run(self, formula=None, **changes):
        """As a correct kernel does: in float32, rounded once."""
        wide = {name: value.float() for name, value in {**self.tensors, **changes}.items()}
        results = forward_and_gradients(formula or self.formula, wide, self.options, self.grad.float())
        return {name: value.to(self.grad.dtype) for name, value in results.items()}

    def passes(self, results):
        try:
            assert_within_rule(results, self.truth, self.base)
        except AssertionError:
            return False
        return True


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_other_orders_of_sums_pass(call, dtype, seed):
    torch.manual_seed(seed)
    prepared = Prepared(call, dtype)
    assert prepared.passes(prepared.run())
    with Products(reversed_sums):
        assert prepared.passes(prepared.run())
    rounded_once = {name: value.to(dtype) for name, value in prepared.truth.items()}
    assert prepared.passes(rounded_once)


@pytest.mark.parametrize("change", [in_bfloat16, in_tf32])
@pytest.mark.parametrize("call", WITH_PRODUCTS)
def test_operands_of_fewer_bits_are_refused(call, change):
    prepared = Prepared(call, torch.float32)
    with Products(change):
        assert not prepared.passes(prepared.run())


@pytest.mark.parametrize("change", [last_term_dropped, one_tap_dropped])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", WITH_PRODUCTS)
def test_missing_terms_are_refused(call, dtype, change):
    if change is one_tap_dropped and not ("leffn" in call or "focal_attention_layer" in call):
        pytest.skip("there is no depthwise convolution")
    prepared = Prepared(call, dtype)
    with Products(change):
        assert not prepared.passes(prepared.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_is_not_read_is_refused(call, dtype):
    prepared = Prepared(call, dtype)
    for name, value in prepared.tensors.items():
        neutral = torch.ones_like(value) if name in ("weight", "norm_weight", "temperature") else torch.zeros_like(value)
        assert not prepared.passes(prepared.run(**{name: neutral})), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_factor_of_one_result_is_refused(call, dtype):
    """By a thousandth in float32, by a fifth where a unit in the last place is up to a hundredth."""
    prepared = Prepared(call, dtype)
    results = prepared.run()
    for name, value in results.items():
        wrong = {**results, name: value * (1.001 if dtype == torch.float32 else 1.2)}
        assert not prepared.passes(wrong), name
