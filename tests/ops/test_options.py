"""Options of the layers on small maps: each on its own, all together, and where they could go wrong."""

import pytest
import torch

from tests.ops.cases import CALLS, assert_within_rule, baseline, build, cast, exact
from tests.ops.test_parity import gradient_of_output, on_backend, runnable

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_HEAD = {"heads": 1}

# name: (call, shape (batch, height, width), fields)
SMALL = {
    "norm_each_image": ("layer_norm_2d/each_image", (3, 3, 5), {}),
    "leffn": ("leffn/biases", (2, 3, 5), {}),
    "leffn_layer": ("leffn_layer/modulated", (2, 4, 5), {}),
    "leffn_layer_wide": ("leffn_layer/modulated", (2, 2, 3), {"channels": 130, "hidden": 20}),
    "leffn_layer_one_gate": ("leffn_layer/layer_scale", (2, 3, 5), {}),
    "grid_layer": ("grid_attention_layer/modulated", (2, 4, 5), {}),
    "grid_layer_one_gate": ("grid_attention_layer/layer_scale", (2, 4, 3), {}),
    "released": ("focal_channel_attention/released", (1, 6, 7), ONE_HEAD),
    "focal_layer": ("focal_attention_layer/modulated", (2, 5, 6), ONE_HEAD),
    "focal_layer_one_window": ("focal_attention_layer/modulated", (2, 3, 6), ONE_HEAD),
    "focal_layer_one_gate": ("focal_attention_layer/layer_scale", (1, 3, 6), ONE_HEAD),
}


def small(name, dtype):
    call, shape, fields = SMALL[name]
    operator, builder, defaults = CALLS[call]
    tensors, options = builder(*shape, **{**defaults, **fields})
    return operator, cast(tensors, dtype, torch.float32), options


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", SMALL)
def test_all_options(name, dtype):
    operator, tensors, options = small(name, dtype)
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options):
        assert_within_rule(on_backend(backend, operator, tensors, options, grad), truth, base)


@pytest.mark.parametrize("call", ["leffn_layer/modulated", "grid_attention_layer/modulated"])
def test_each_option_alone(call):
    """One bias, the gate, or one parameter of the norm of each image; a gate and a norm in either form."""
    operator, tensors, options = build(call, (2, 3, 4), torch.float32)
    added = [name for name in tensors if name == "gate" or name.endswith("_bias")]
    for name in [*added, "norm_weight"]:
        chosen = {key: value for key, value in tensors.items() if key == name or key not in added}
        chosen["norm_weight"] = tensors["norm_weight"][0] if name in ("norm_bias", "gate") else tensors["norm_weight"]
        alone = {**options, **({} if "norm_bias" in chosen else {"norm_bias": None})}
        grad = gradient_of_output(operator, chosen, alone)
        truth, base = exact(operator, chosen, alone, grad), baseline(operator, chosen, alone, grad)
        for backend in runnable(operator, chosen, alone):
            assert_within_rule(on_backend(backend, operator, chosen, alone, grad), truth, base)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", ["leffn_layer", "grid_attention_layer", "focal_attention_layer"])
def test_a_gate_of_zero(call, dtype):
    """As training begins: the layer is the identity, its gate has a gradient, and what lies before the gate none."""
    operator, tensors, options = build(f"{call}/modulated", (2, 3, 4), dtype)
    tensors["gate"] = torch.zeros_like(tensors["gate"])
    grad = gradient_of_output(operator, tensors, options)
    truth, base = exact(operator, tensors, options, grad), baseline(operator, tensors, options, grad)
    for backend in runnable(operator, tensors, options):
        got = on_backend(backend, operator, tensors, options, grad)
        assert_within_rule(got, truth, base)
        assert torch.equal(got.pop("out"), tensors["x"]) and torch.equal(got.pop("x"), grad)
        assert got.pop("gate").any() and not any(value.any() for value in got.values())


@pytest.mark.parametrize("corner", [(0, 0), (5, 6)])
def test_nothing_wraps_around_where_the_shift_is_not_cyclic(corner):
    """A value that is not a number, in the border, spoils its own window alone, in the result and in gradients."""
    operator, tensors, options = small("released", torch.float32)
    tensors["qkv"][..., corner[0], corner[1]] = float("nan")
    row, column = (4 * (i // 4) for i in corner)
    for backend in runnable(operator, tensors, options):
        got = on_backend(backend, operator, tensors, options, gradient_of_output(operator, tensors, options))
        for name in ("out", "qkv"):
            spoilt = torch.zeros(6, 7, dtype=torch.bool)
            spoilt[row : row + 4, column : column + 4] = True
            assert torch.equal(got[name].isnan().any(dim=1)[0].cpu(), spoilt), (backend, name)
        assert got["bottom_weight"].isfinite().all() and got["temperature"][1].isfinite().all()


@pytest.mark.parametrize("cyclic", [True, False])
def test_a_map_of_one_window_has_one_branch_in_the_released_reading(cyclic):
    operator, tensors, options = small("focal_layer_one_window", torch.float32)
    options["cyclic"] = cyclic
    for backend in runnable(operator, tensors, options):
        got = on_backend(backend, operator, tensors, options, gradient_of_output(operator, tensors, options))
        second = got["token_weight"][1], got["temperature"][1], got["top_weight"], got["bottom_weight"]
        assert all(value.any() == cyclic for value in second), backend
