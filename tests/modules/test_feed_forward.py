"""RepLeFFN: the training form, the form merged inside the training forward and the merged form are one function."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from ipt_fast import ops
from ipt_fast.modules import RepLeFFN
from ipt_fast.modules._layer import Modulation, residual
from ipt_fast.modules.normalization import ModulatedLayerNorm2d
from tests.oracles import naive

SHAPES = [(2, 6, 7, 9), (1, 6, 1, 1), (1, 6, 2, 3), (1, 6, 1, 40)]


def rep_leffn(channels=6, **options):
    module = RepLeFFN(channels, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel()) ** -0.5)
    return module


def branches(module, x):
    """Spec 1.4, training form: every branch as a convolution of its own."""
    w = dict(module.named_parameters())

    def conv(x, name, **options):
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options)

    hidden = F.gelu(conv(conv(x, "expand.first"), "expand.second"))
    groups = hidden.shape[1]
    hidden = hidden + sum(conv(hidden, f"depthwise.k{k}", padding=k // 2, groups=groups) for k in (5, 3, 1))
    return conv(conv(hidden, "project.first"), "project.second")


@pytest.fixture
def fused_calls(monkeypatch):
    """How many pixels each fused LeFFN ran on."""
    calls = []
    real = ops.leffn

    def spy(x, **weights):
        calls.append(x.shape[0] * x.shape[2] * x.shape[3])
        return real(x, **weights)

    monkeypatch.setattr(ops, "leffn", spy)
    return calls


def test_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in RepLeFFN(6, ratio=3, inner_ratio=2).state_dict().items()}
    assert shapes == {
        "expand.first.weight": (12, 6, 1, 1),
        "expand.second.weight": (18, 12, 1, 1),
        "depthwise.k5.weight": (18, 1, 5, 5),
        "depthwise.k3.weight": (18, 1, 3, 3),
        "depthwise.k1.weight": (18, 1, 1, 1),
        "project.first.weight": (12, 18, 1, 1),
        "project.second.weight": (6, 12, 1, 1),
    }
    shapes = {name: tuple(value.shape) for name, value in RepLeFFN(6, merged=True).state_dict().items()}
    assert shapes == {
        "expand.weight": (24, 6, 1, 1),
        "depthwise.weight": (24, 1, 5, 5),
        "project.weight": (6, 24, 1, 1),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_form_equals_its_branches(shape, bias):
    """Output and the gradient of the image and of every branch, on both sides of the threshold."""
    module, x = rep_leffn(bias=bias).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    out, expected = module(x), branches(module, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    names = ["x", *(name for name, _ in module.named_parameters())]
    for name, got, wanted in zip(
        names, torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max(), name


def test_merged_form_is_the_naive_formula():
    module = rep_leffn(3, ratio=2).double()
    module.reparameterize()
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    expected = naive.leffn(x, *(parameter.detach().numpy() for parameter in module.parameters()))
    torch.testing.assert_close(module(x).detach(), torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [6, 9, 16])
def test_merges_inside_the_training_forward_above_4c_over_3_pixels(channels, fused_calls):
    """Spec 1.4: a merge costs 8C^3, the branches 6C^2 more per pixel; pixels of the whole batch count."""
    module, threshold = rep_leffn(channels), 4 * channels / 3
    below, above = math.floor(threshold), math.floor(threshold) + 1
    module(torch.randn(1, channels, 1, below))
    assert fused_calls == []
    module(torch.randn(1, channels, above, 1))
    module(torch.randn(above, channels, 1, 1))
    assert fused_calls == [above, above]


def test_merged_form_is_always_fused(fused_calls):
    module = RepLeFFN(6, merged=True)
    module(torch.randn(1, 6, 1, 1))
    module(torch.randn(1, 6, 9, 9))
    assert fused_calls == [1, 81]


def test_the_merge_inside_the_forward_follows_the_weights():
    """No stale merged copy: the weights may change in any way between two forwards."""
    module, x = rep_leffn(), torch.randn(1, 6, 8, 8)
    module(x)
    module.expand.first.weight.data.mul_(2)
    module.depthwise.k3.weight.data = torch.randn_like(module.depthwise.k3.weight)
    torch.testing.assert_close(module(x), branches(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_reparameterize_keeps_the_function(shape):
    module, x = rep_leffn(), torch.randn(shape)
    expected = module(x)
    module.reparameterize()
    assert set(module.state_dict()) == {"expand.weight", "depthwise.weight", "project.weight"}
    assert (module(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_are_merged_in_fp64_and_rounded_once(dtype):
    module = rep_leffn(bias=True).to(dtype)
    wide = {name: value.double() for name, value in module.state_dict().items()}
    merged = RepLeFFN(6, bias=True, merged=True).to(dtype)
    merged.load_state_dict(module.state_dict())
    module.reparameterize()
    expected = {"depthwise": sum(wide[f"depthwise.k{k}.bias"] for k in (5, 3, 1))}
    for name in ("expand", "project"):
        through = wide[f"{name}.second.weight"].flatten(1) @ wide[f"{name}.first.bias"]
        expected[name] = through + wide[f"{name}.second.bias"]
    for name, value in expected.items():
        assert torch.equal(getattr(module, name).bias, value.to(dtype))
        assert torch.equal(getattr(merged, name).bias, value.to(dtype))
        assert getattr(module, name).bias.requires_grad
    if dtype == torch.float32:
        x = torch.randn(1, 6, 9, 9)
        torch.testing.assert_close(merged(x), module(x))
    with pytest.raises(RuntimeError, match="expand.bias"):
        RepLeFFN(6, merged=True).load_state_dict(rep_leffn(bias=True).state_dict())


@pytest.mark.parametrize("branch", ["expand.first", "expand.second", "depthwise.k3", "project.first"])
def test_a_bias_of_one_branch_is_merged(branch):
    module, x = rep_leffn(), torch.randn(1, 6, 9, 9)
    module.get_submodule(branch).bias = torch.nn.Parameter(torch.randn(module.get_submodule(branch).out_channels))
    expected = branches(module, x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    module.reparameterize()
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert [name for name in module.state_dict() if name.endswith("bias")] == [f"{branch.split('.')[0]}.bias"]


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_with_biases(shape):
    """Modulated: as one operator, by branches and merged."""
    module, x = rep_leffn(bias=True), torch.randn(shape)
    modulation = Modulation(*torch.randn(3, shape[0], 6))
    norm = ModulatedLayerNorm2d()
    normed = norm(x, modulation.weight, modulation.bias)
    expected = x + modulation.gate[..., None, None] * branches(module, normed)
    torch.testing.assert_close(residual(x, norm, module, modulation), expected, rtol=1e-4, atol=1e-5)
    module.reparameterize()
    torch.testing.assert_close(residual(x, norm, module, modulation), expected, rtol=1e-4, atol=1e-5)


def test_reparameterize_is_idempotent():
    module = rep_leffn()
    module.reparameterize()
    first = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = list(module.parameters())
    module.reparameterize()
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert all(torch.equal(value, first[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merges_in_fp64_and_rounds_once(dtype):
    module = rep_leffn(16).to(dtype)
    wide = {name: value.double() for name, value in module.state_dict().items()}
    module.reparameterize()
    for name in ("expand", "project"):
        first, second = wide[f"{name}.first.weight"], wide[f"{name}.second.weight"]
        expected = (second.flatten(1) @ first.flatten(1))[:, :, None, None].to(dtype)
        assert torch.equal(getattr(module, name).weight, expected)
    merged = wide["depthwise.k5.weight"].clone()
    merged[..., 1:4, 1:4] += wide["depthwise.k3.weight"]
    merged[..., 2:3, 2:3] += wide["depthwise.k1.weight"] + 1
    assert torch.equal(module.depthwise.weight, merged.to(dtype))


def test_merged_parameters_keep_their_switches():
    module = rep_leffn().requires_grad_(False).eval()
    module.reparameterize()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(child.training for child in module.modules())
    module = rep_leffn()
    module.reparameterize()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in module.parameters())
    module(torch.randn(1, 6, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_training_state_loads_into_the_merged_form():
    module, x = rep_leffn(), torch.randn(1, 6, 9, 9)
    merged = RepLeFFN(6, merged=True)
    state = module.state_dict()
    before = dict(state)
    merged.load_state_dict(state)
    assert state.keys() == before.keys()
    assert (merged(x) - module(x)).abs().max() <= 1e-5 * module(x).abs().max()
    with pytest.raises(RuntimeError, match="expand.weight"):
        module.load_state_dict(merged.state_dict())


@pytest.mark.parametrize("reparameterized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_and_conversions(reparameterized, dtype):
    module = rep_leffn()
    if reparameterized:
        module.reparameterize()
    copied = copy.deepcopy(module).to(dtype)
    x = torch.randn(1, 6, 9, 9)
    out = copied(x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - module(x).double()).abs().max() <= 0.05 * module(x).abs().max()
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(module.parameters()).any()
    copied.reparameterize()
    assert set(copied.state_dict()) == {"expand.weight", "depthwise.weight", "project.weight"}
    # The hook of a copy merges into the copy.
    target = copy.deepcopy(RepLeFFN(6, merged=True))
    source = rep_leffn()
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reparameterized", [False, True])
def test_pickled_modules(reparameterized, tmp_path):
    module, x = rep_leffn(), torch.randn(1, 6, 9, 9)
    if reparameterized:
        module.reparameterize()
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded(x), module(x))
    loaded.reparameterize()
    loaded.load_state_dict(rep_leffn().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 6, 2, 2), (1, 6, 8, 8)])
def test_autocast_merges_in_fp32_and_rounds_once(shape, dtype):
    module, x = rep_leffn(), torch.randn(shape)
    with torch.autocast("cpu", dtype=dtype):
        out = module(x)
    assert out.dtype == dtype
    expected = branches(module, x)
    assert (out - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    out.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    if shape[-1] == 8:
        merged = copy.deepcopy(module)
        merged.reparameterize()
        with torch.autocast("cpu", dtype=dtype):
            assert (merged(x) - out).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_empty_batch():
    module = rep_leffn()
    out = module(torch.zeros(0, 6, 4, 4))
    assert out.shape == (0, 6, 4, 4)
    out.sum().backward()
    assert all(not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": 6.0}, "channels"),
        ({"ratio": 0}, "ratio"),
        ({"inner_ratio": -1}, "inner_ratio"),
        ({"bias": 1}, "bias"),
        ({"kernel_size": 3}, "kernel_size"),
        ({"kernel_size": 4, "merged": True}, "kernel_size"),
        ({"kernel_size": -1, "merged": True}, "kernel_size"),
        ({"kernel_size": "5", "merged": True}, "kernel_size"),
        ({"kernel_size": 5.0, "merged": True}, "kernel_size"),
    ],
)
def test_bad_arguments(options, name):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        RepLeFFN(**{"channels": 6} | options)


def test_merged_form_of_another_kernel_size():
    x = torch.randn(1, 6, 5, 5)
    for size in (1, 3, 7):
        assert RepLeFFN(6, kernel_size=size, merged=True)(x).shape == x.shape


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 5), (1, 1, 6, 5, 5), (1, 6, 0, 5), (1, 5, 9, 9), (1, 5, 1, 1)])
def test_bad_images(shape, merged):
    """The same kind of error whichever way the module would have taken."""
    with pytest.raises(ValueError):
        RepLeFFN(6, merged=merged)(torch.zeros(shape))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda", "reference", "auto"])
def test_merging_for_good_does_not_ask_for_a_backend(backend, monkeypatch):
    """It is in float64, for which there are no kernels, and gives the same bits whatever is demanded."""
    module = rep_leffn()
    expected = copy.deepcopy(module)
    expected.reparameterize()
    loaded = RepLeFFN(6, merged=True)
    monkeypatch.setenv("IPT_FAST_BACKEND", backend)
    loaded.load_state_dict(module.state_dict())
    module.reparameterize()
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value) and torch.equal(loaded.state_dict()[name], value)
