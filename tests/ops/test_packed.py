"""Operators whose weights are packed: what a call brings takes the place of what was packed."""

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.ops import _cpu
from ipt_fast.ops._operator import OPERATORS
from tests.ops.cases import CALLS, build, cast_by_autocast, public

pytestmark = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = ["leffn_layer", "focal_attention_layer", "grid_attention_layer", "window_attention_layer"]
OF_RELATIVES = [
    *(f"channel_attention_layer{form}" for form in ("", "/bias_free", "/windows")),
    *(f"feed_forward_layer{form}" for form in ("", "/gdfn", "/sgfn")),
]


def variants(name):
    """The calls of layers that have this variant."""
    return [call for call in (f"{layer}/{name}" for layer in LAYERS) if call in CALLS]


def prepared(call, dtype):
    """(x, tensors, options, what is packed, dtype of the packed call, output of the operator)."""
    operator, tensors, options = build(call, (2, 9, 11), torch.float32)
    given = cast_by_autocast(operator, tensors, dtype)
    with torch.no_grad(), ipt_fast.use_backend("cpu"):
        expected = public(operator, given, options)
    return given.pop("x"), given, {**tensors, **options}, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", ["leffn", "leffn/biases", *LAYERS, *OF_RELATIVES, *variants("layer_scale")])
def test_packed_once(call, dtype):
    x, _, arguments, expected = prepared(call, dtype)
    run, block, inner = _cpu.pack(OPERATORS[call.split("/")[0]], arguments, dtype)
    assert torch.equal(run(x.to(inner), block).to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [*LAYERS, *OF_RELATIVES, *variants("modulated")])
def test_each_call_brings_its_norm_and_gate(call, dtype):
    x, given, arguments, expected = prepared(call, dtype)
    of_call = {name: arguments.pop(name) for name in _cpu.OF_IMAGES if name in given}
    run, block, inner = _cpu.pack(OPERATORS[call.split("/")[0]], arguments, dtype)
    assert torch.equal(run(x.to(inner), block, **of_call).to(dtype), expected)
    # They take the place of packed ones.
    others = {name: torch.ones(x.shape[1]) for name in of_call}
    run, block, inner = _cpu.pack(OPERATORS[call.split("/")[0]], {**arguments, **others}, dtype)
    assert torch.equal(run(x.to(inner), block, **of_call).to(dtype), expected)


LEVELS = torch.ops.ipt_fast_cpu.isa_levels() if _extension.load() else []


@pytest.mark.skipif("amx_fp32" not in LEVELS, reason="this processor has no matrix unit")
@pytest.mark.parametrize(
    ("call", "fields"),
    [("leffn_layer", {"channels": 64, "hidden": 256}), ("channel_attention_layer", {"heads": 2, "depth": 32})],
)
def test_only_thirds_take_more_than_their_weights(call, fields, monkeypatch):
    """A value of float32 is three of 16 bits where the matrix unit multiplies it, and four bytes everywhere else."""
    operator, builder, _ = CALLS[call]
    tensors, options = builder(1, 3, 4, **fields)
    tensors = {name: value.float() for name, value in tensors.items()}
    products = [value.numel() for name, value in tensors.items() if value.shape[2:] == (1, 1)]
    sizes = {}
    for level in LEVELS:
        monkeypatch.setenv("IPT_FAST_CPU_ISA", level)
        sizes[level] = _cpu.pack(OPERATORS[operator], {**tensors, **options}, torch.float32)[1].numel()
    expected = sizes.pop("amx_fp32") - 2 * sum(products)
    assert sizes == dict.fromkeys(sizes, expected)


@pytest.mark.parametrize("call", [*LAYERS, "channel_attention_layer", "feed_forward_layer"])
def test_what_does_not_fit_is_named(call):
    x, _, arguments, _ = prepared(call, torch.float32)
    weight, bias = arguments.pop("norm_weight"), arguments.pop("norm_bias")
    run, block, _ = _cpu.pack(OPERATORS[call], arguments, torch.float32)
    with pytest.raises(ValueError, match="norm_weight must be given, as none was packed"):
        run(x, block)
    with pytest.raises(ValueError, match="norm_bias must be None where norm_weight is"):
        run(x, block, None, bias)
    with pytest.raises(
        ValueError, match=r"norm_weight must have shape \[\d+\], or \[2, \d+\] of each image; got \[2\]"
    ):
        run(x, block, weight[:2])
    with pytest.raises(TypeError, match="norm_bias must be Float; got BFloat16"):
        run(x, block, weight, bias.bfloat16())
    each = torch.ones(len(arguments[next(iter(OPERATORS[call].weights))]), len(weight))
    with pytest.raises(ValueError, match=r"norm_weight must be \(C,\) to be packed"):
        _cpu.pack(OPERATORS[call], {**arguments, "norm_weight": each}, torch.float32)
