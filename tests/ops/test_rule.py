"""The error rule itself: what other machines may make of a formula passes, what is a little wrong does not."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ipt_fast import reference
from tests.ops.cases import CALLS, MERGES, as_one, assert_within_rule, baseline, build, exact, forward_and_gradients
from tests.ops.test_levels import large

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMMED = {torch.Tensor.matmul: (-1, -2), torch.conv2d: (1, 1), F.linear: (-1, -1)}  # axes of both factors
WITH_TAPS = [call for call, (operator, *_) in CALLS.items() if operator not in MERGES | {"layer_norm_2d"}]
WITH_PRODUCTS = [call for call in WITH_TAPS if CALLS[call][0] != "depthwise_layer"]


class Products(TorchFunctionMode):
    """Replaces the two factors of every matrix product, linear layer and convolution by ``change`` of them."""

    def __init__(self, change):
        self.change, self.changed = change, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in SUMMED:
            depthwise = func is torch.conv2d and (kwargs or {}).get("groups", 1) > 1
            axes = None if depthwise else SUMMED[func]
            operands = self.change(*args[:2], axes)
            self.changed |= operands[0] is not args[0] or operands[1] is not args[1]
            args = *operands, *args[2:]
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
    return value + (torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent) - value.detach())


def in_bfloat16(a, b, _):
    return rounded(a, 8), rounded(b, 8)


def in_tf32(a, b, _):
    return rounded(a, 11), rounded(b, 11)


class NarrowSums(TorchFunctionMode):
    """Pointwise convolutions that round after every product and every sum."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d and args[1].shape[-1] == 1:
            image, weight = args[:2]
            return sum(image[:, i : i + 1] * weight[None, :, i] for i in range(image.shape[1]))
        return func(*args, **(kwargs or {}))


class Prepared:
    """A call with what the rule needs to judge its results."""

    def __init__(self, operator, tensors, options):
        self.operator, self.tensors, self.options = operator, tensors, options
        self.formula = getattr(reference, self.operator).formula
        out = as_one(self.formula(**self.tensors, **self.options))
        self.grad = torch.randn(out.shape).to(out)
        arguments = self.operator, self.tensors, self.options, self.grad
        self.truth, self.base = exact(*arguments), baseline(*arguments)

    def run(self, dtype=torch.float32, **changes):
        """As a correct kernel does: in float32, rounded once."""
        values = {name: value.to(dtype) for name, value in {**self.tensors, **changes}.items()}
        results = forward_and_gradients(self.formula, values, self.options, self.grad)
        return {name: value.to(self.grad.dtype) for name, value in results.items()}

    def passes(self, results):
        try:
            assert_within_rule(results, self.truth, self.base)
        except AssertionError:
            return False
        return True


@functools.cache
def prepared(call, dtype):
    torch.manual_seed(0)
    return Prepared(*build(call, (2, 7, 13), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_other_orders_of_sums_pass(call, dtype):
    right = prepared(call, dtype)
    assert right.passes(right.run())
    with Products(reversed_sums) as products:
        assert right.passes(right.run())
    assert products.changed == (call in WITH_PRODUCTS or call == "merge_pointwise")
    assert right.passes({name: value.to(dtype) for name, value in right.truth.items()})


@pytest.mark.parametrize("change", [in_bfloat16, in_tf32])
@pytest.mark.parametrize("call", WITH_TAPS)
def test_operands_of_fewer_bits_are_refused(call, change):
    right = prepared(call, torch.float32)
    with Products(change):
        wrong = right.run()
    assert not right.passes(wrong)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("call", ["leffn", "leffn_layer"])
def test_sums_in_16_bits_are_refused(call, dtype):
    right = Prepared(*large(call, dtype))
    assert right.passes(right.run())
    with NarrowSums():
        wrong = right.run(dtype)
    assert not right.passes(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", WITH_TAPS)
def test_missing_terms_are_refused(call, dtype):
    right = prepared(call, dtype)
    changed = []
    for change in (last_term_dropped, one_tap_dropped):
        with Products(change) as products:
            wrong = right.run()
        changed.append(products.changed)
        assert right.passes(wrong) != products.changed
    assert changed[0] == (call in WITH_PRODUCTS) and any(changed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_is_not_read_is_refused(call, dtype):
    right = prepared(call, dtype)
    for name, value in right.tensors.items():
        neutral = (
            torch.ones_like(value) if name in ("weight", "norm_weight", "temperature") else torch.zeros_like(value)
        )
        assert not right.passes(right.run(**{name: neutral})), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_factor_of_one_result_is_refused(call, dtype):
    """By a thousandth in float32, by a half in 16 bits, where a norm of three nearly equal channels loses a tenth."""
    right = prepared(call, dtype)
    results = right.run()
    for name, value in results.items():
        wrong = {**results, name: value * (1.001 if dtype == torch.float32 else 1.5)}
        assert not right.passes(wrong), name
