"""Every form of feed_forward_layer in C++ on small maps that cross its tiles, strips and blocks."""

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.reference.feed_forward_layer import FORMS
from tests.ops.cases import CALLS, assert_within_rule, baseline, cast, exact, forward_and_gradients
from tests.ops.relatives import HALVES
from tests.ops.test_parity import gradient_of_output

pytestmark = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))

OPERATOR, BUILDER, _ = CALLS["feed_forward_layer"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BIASES = ("expand_bias", "depthwise_bias", "project_bias", "gate", "norm_bias", "inner_bias")


def on_cpu(tensors, options, grad):
    with ipt_fast.use_backend("cpu"):
        return forward_and_gradients(ipt_fast.ops.feed_forward_layer, tensors, options, grad)


def check(tensors, options, dtype):
    tensors = cast(tensors, dtype)
    grad = gradient_of_output(OPERATOR, tensors, options)
    truth, base = exact(OPERATOR, tensors, options, grad), baseline(OPERATOR, tensors, options, grad)
    assert_within_rule(on_cpu(tensors, options, grad), truth, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_sizes(form, dtype):
    """One pixel, a map narrower than the kernel, several strips, and blocks of hidden channels with a rest."""
    halves = 2 if form in HALVES else 1
    for shape, fields in [
        ((1, 1, 1), {"hidden": 7 * halves, "kernel": 5}),
        ((2, 5, 2), {"hidden": 33 * halves, "kernel": 7}),
        ((1, 3, 70), {"hidden": 127 * halves, "channels": 20}),
    ]:
        check(*BUILDER(*shape, form=form, **fields), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_a_map_of_many_strips(form):
    """So many hidden channels that the ring of their rows takes several strips."""
    tensors, options = BUILDER(1, 2, 150, form=form, hidden=2 * 333, bias=False)
    check(tensors, options, torch.float32)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("form", FORMS)
def test_a_map_of_many_tiles(form, kernel):
    """Rows, columns and hidden channels that the backward's kernels cut into several tiles and chunks."""
    tensors, options = BUILDER(2, 37, 71, form=form, hidden=2 * 83, **({} if form == "mlp" else {"kernel": kernel}))
    check(tensors, options, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_each_option_alone(form):
    tensors, options = BUILDER(2, 4, 5, form=form)
    for kept in [None, *BIASES]:
        some = {name: value for name, value in tensors.items() if name == kept or name not in BIASES}
        check(some, {**options, **({} if kept == "norm_bias" else {"norm_bias": None})}, torch.float32)
    of_images = {name: torch.stack([tensors[name], 0.5 - tensors[name]]) for name in ("norm_weight", "gate")}
    check({**tensors, **of_images}, options, torch.float32)
    check(tensors, {**options, "centered": False, "eps": 0.1, "inner_eps": 0.2}, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_of_zero_leaves_x(form):
    tensors, options = BUILDER(2, 4, 5, form=form)
    tensors["gate"] = torch.zeros_like(tensors["gate"])
    check(tensors, options, torch.bfloat16)
    tensors = cast(tensors, torch.float32)
    with ipt_fast.use_backend("cpu"):
        assert torch.equal(ipt_fast.ops.feed_forward_layer(**tensors, **options), tensors["x"])


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_reach_of_the_kernel(form):
    tensors, options = BUILDER(2, 9, 35, form=form, kernel=5)
    tensors = cast(tensors, torch.float32)
    tensors["x"][1, 2, 4, 20] = float("nan")
    with ipt_fast.use_backend("cpu"):
        out = ipt_fast.ops.feed_forward_layer(**tensors, **options)
    reach = 0 if form == "mlp" else 2
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[1, :, 4 - reach : 5 + reach, 20 - reach : 21 + reach] = True
    assert torch.equal(out.isnan(), reached)
