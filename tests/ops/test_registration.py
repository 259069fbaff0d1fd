"""What PyTorch is told about the operators: schema, fakes, autograd, FLOPs."""

import math
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from ipt_fast.ops._operator import OPERATORS as REGISTRY
from ipt_fast.ops._operator import Operator
from ipt_fast.reference._precision import in_full_precision
from tests.ops.cases import CALLS, ON_TOKENS, OPERATORS, build, outputs, public

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = [call for call in CALLS if "/" in call]
# All that opcheck tries but compiling for any shape, which takes a second a call: once for each operator is enough.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL = (*QUICK, "test_aot_dispatch_dynamic")


def positional(operator, tensors, options):
    """All arguments in the order of the schema, as the public function gives them to the operator."""
    given = []
    with mock.patch.object(Operator, "__call__", lambda self, *arguments: given.append(arguments) or arguments):
        REGISTRY[operator].function(**tensors, **options)
    return list(given[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", OPERATORS)
def test_opcheck_forward(call, dtype):
    operator, tensors, options = build(call, (2, 5, 6), dtype, small_dtype=torch.float32)
    tensors = {name: value.requires_grad_() for name, value in tensors.items()}
    torch.library.opcheck(getattr(torch.ops.ipt_fast, operator).default, positional(operator, tensors, options))


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 1, 1)])
@pytest.mark.parametrize("call", VARIANTS)
def test_opcheck_forward_of_other_options_and_a_pixel(call, shape):
    operator, tensors, options = build(call, shape, torch.float32)
    arguments = positional(operator, tensors, options)
    torch.library.opcheck(getattr(torch.ops.ipt_fast, operator).default, arguments, test_utils=QUICK)


def assert_backward_checks(operator, tensors, options, backend, tests=ALL):
    declared, arguments = REGISTRY[operator], positional(operator, tensors, options)
    found = getattr(torch.ops.ipt_fast, operator).default(*arguments)
    found = found if isinstance(found, tuple) else (found,)
    grads = [torch.randn_like(out) for out in found[: len(declared.outputs)]]
    kept = dict(zip([*declared.outputs, *declared.kept], found, strict=True))
    if declared.residual is not None:
        x, _, total = declared.residual
        arguments[declared.arguments.index(x)] = kept[total]
        declared.kept.get(total) and kept.pop(total)
    kept = [kept[name] for name in declared.kept if name in kept]
    backward = getattr(torch.ops.ipt_fast, f"{operator}_backward").default
    torch.library.opcheck(backward, [*grads, *arguments, *kept, backend], test_utils=tests)


@pytest.mark.parametrize(("call", "dtype"), [(c, d) for c in CALLS for d in DTYPES if d == DTYPES[0] or c in OPERATORS])
def test_opcheck_backward(call, dtype):
    operator, tensors, options = build(call, (2, 5, 6), dtype, small_dtype=torch.float32)
    for backend, reason in ipt_fast.explain(operator, **tensors, **options)[operator].items():
        if reason is None:
            compiled = call in OPERATORS and dtype == torch.float32 and backend == "reference"
            assert_backward_checks(operator, tensors, options, backend, ALL if compiled else QUICK)


@pytest.mark.parametrize("call", ["layer_norm_2d", "grid_attention", "leffn"])
def test_opcheck_of_non_contiguous_images(call):
    operator, tensors, options = build(call, (2, 5, 6), torch.float32)
    name = next(iter(tensors))
    tensors[name] = tensors[name].transpose(2, 3)[..., ::2]
    torch.library.opcheck(getattr(torch.ops.ipt_fast, operator).default, positional(operator, tensors, options))
    assert_backward_checks(operator, tensors, options, "reference")


@pytest.mark.parametrize("operator", OPERATORS)
def test_meta_tensors(operator):
    _, tensors, options = build(operator, (2, 5, 6), torch.float32)
    expected = outputs(operator, tensors, options)
    leaves = {name: value.to("meta").requires_grad_() for name, value in tensors.items()}
    found = outputs(operator, leaves, options)
    for out, real in zip(found, expected, strict=True):
        assert out.is_meta and (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
    sum(out.sum() for out in found).backward()
    assert all(value.grad.shape == value.shape for value in leaves.values())


def pairs_of_windows(size, window, shift, keys):
    """Of one axis: all keys of its window, or those of its window inside the map, for every query."""
    if keys is not None and keys != window:
        return size * keys
    windows = [(i - shift) // window for i in range(size)]
    return sum(windows.count(i) for i in windows)


def macs(operator, tensors, options):
    """Multiply-accumulates of matrix products and convolutions, counted pixel by pixel from the formula."""
    if operator == "merge_pointwise":
        mid, cin = tensors["first"].shape[:2]
        return tensors["second"].shape[0] * mid * cin
    if operator in ("layer_norm_2d", "merge_depthwise"):
        return 0
    if operator in ON_TOKENS:
        tokens = tensors["x"].shape[0] * tensors["x"].shape[1]
        return tokens * sum(tensors[name].numel() for name in ("weight", "weight1", "weight2") if name in tensors)
    image = next(iter(tensors.values()))
    batch, channels, height, width = image.shape
    pixels = batch * height * width
    if operator in ("depthwise_layer", "gated_projection", "pointwise_layer", "dense_convolution"):
        return pixels * tensors["weight"].numel()
    if operator.endswith("_layer"):
        names = ("expand_weight", "qkv_weight", "depthwise_weight", "project_weight")
        convolutions = pixels * sum(tensors[name].numel() for name in names if name in tensors)
        if operator in ("leffn_layer", "feed_forward_layer"):
            return convolutions
        if operator == "channel_attention_layer":
            return convolutions + macs("channel_attention", {"q": torch.empty(image.shape)}, options)
        if operator == "window_attention_layer":
            maps = {name: torch.empty(image.shape) for name in "qk"}
            return convolutions + macs("window_attention", maps, options)
        attention = {"focal_attention_layer": "focal_channel_attention", "grid_attention_layer": "grid_attention"}
        qkv = torch.empty(batch, 3 * channels, height, width)
        return convolutions + macs(attention[operator], {"qkv": qkv}, options)
    if operator == "leffn":
        hidden, kernel = tensors["expand_weight"].shape[0], tensors["depthwise_weight"].shape[-1]
        return pixels * hidden * (channels + kernel**2 + tensors["project_weight"].shape[0])
    if operator == "channel_attention":
        return 2 * pixels * channels**2 // options["num_heads"]
    if operator == "window_attention":
        window, shift, keys = (options.get(name) or (None, None) for name in ("window_size", "shift", "key_size"))
        return 2 * batch * channels * math.prod(map(pairs_of_windows, image.shape[2:], window, shift, keys))
    if operator == "focal_channel_attention":
        return 4 * pixels * (channels // 3) ** 2 // options["num_heads"]
    cubby = [-(-size // options["grid_size"]) for size in (height, width)]
    groups = [(i % cubby[0], j % cubby[1]) for i in range(height) for j in range(width)]
    pairs = sum(groups.count(group) for group in groups)  # a query meets the keys of its group that exist
    return 2 * batch * pairs * channels // 3


@pytest.mark.parametrize("shape", [(2, 8, 9), (1, 7, 5), (1, 2, 1)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("call", CALLS)
def test_flops_forward_and_backward(call, device, shape):
    operator, tensors, options = build(call, shape, torch.float32)
    expected = 2 * macs(operator, tensors, options)
    leaves = {name: value.to(device).requires_grad_() for name, value in tensors.items()}
    with FlopCounterMode(display=False) as counter:
        public(operator, leaves, options)
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        public(operator, leaves, options).sum().backward()
    assert counter.get_total_flops() == 3 * expected


def test_an_operator_of_one_tensor(monkeypatch):
    @in_full_precision
    def doubled(x):
        return 2 * x

    monkeypatch.setitem(REGISTRY, "doubled", None)  # taken back at the end
    call = Operator(
        doubled, "Tensor x", doubled, images=("x",), output_shape=lambda x: x.shape, flops=lambda x: x.numel()
    )
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        x = torch.randn(1, 2, 3, 4, requires_grad=True)
        function(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))
    torch.library.opcheck(torch.ops.ipt_fast.doubled.default, (x,))
