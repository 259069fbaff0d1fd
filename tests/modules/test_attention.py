"""FCSA and GGSA: initial values, shapes, and equality with their composition."""

import copy

import pytest
import torch
import torch.nn.functional as F

import ipt_fast
from ipt_fast.modules import FocalContextSelfAttention, GlobalGridSelfAttention, LayerNorm2d
from tests.oracles import naive

SIZES = [(1, 1), (1, 7), (7, 1), (5, 11), (8, 8)]


def focal(channels=6, heads=2, window=4):
    return FocalContextSelfAttention(channels, heads, window)


def grid(channels=6, heads=2, size=3):
    return GlobalGridSelfAttention(channels, heads, size)


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def test_initial_values_of_focal_attention():
    module = focal(channels=8, heads=4, window=5)
    assert torch.equal(module.temperature, torch.ones(4))
    assert torch.equal(module.token_weight, torch.ones(4, 5, 5))
    assert torch.equal(module.top_weight, torch.full((4, 5, 5), 0.5))
    assert torch.equal(module.bottom_weight, torch.full((4, 5, 5), 0.5))
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_parameters_of_focal_attention():
    expected = {"qkv": (24, 8, 1, 1), "depthwise": (24, 1, 3, 3), "project": (8, 8, 1, 1)}
    shapes = {name: tuple(value.shape) for name, value in focal(8, 4, 5).state_dict().items()}
    maps = {name: (4, 5, 5) for name in ("token_weight", "top_weight", "bottom_weight")}
    assert shapes == {f"{name}.weight": shape for name, shape in expected.items()} | maps | {"temperature": (4,)}


def test_bias_table_starts_as_a_truncated_normal():
    module = grid(channels=8, heads=8, size=16)
    table = module.bias_table.detach()
    assert table.shape == (31**2, 8)
    assert abs(table.std().item() - 0.02) < 0.002 and abs(table.mean().item()) < 0.002
    assert table.abs().max() <= 2
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {"qkv.weight": (24, 8, 1, 1), "project.weight": (8, 8, 1, 1), "bias_table": (961, 8)}


@pytest.mark.parametrize("window", [4, 5])
@pytest.mark.parametrize("size", SIZES)
def test_focal_attention_is_its_composition(size, window):
    """Spec 1.2: q, k, v from PW then DW 3x3, attention by the naive formula, PW."""
    module, x = randomize(focal(window=window)).double(), torch.randn(2, 6, *size, dtype=torch.float64)
    qkv = F.conv2d(F.conv2d(x, module.qkv.weight), module.depthwise.weight, padding=1, groups=18).detach()
    maps = (module.temperature, module.token_weight, module.top_weight, module.bottom_weight)
    attended = naive.focal_channel_attention(qkv, *(m.detach() for m in maps), num_heads=2, window_size=window)
    expected = F.conv2d(torch.from_numpy(attended), module.project.weight)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_grid_attention_is_its_composition(size):
    """Spec 1.3: q, k, v from PW, attention by the naive formula, PW."""
    module, x = randomize(grid()).double(), torch.randn(2, 6, *size, dtype=torch.float64)
    qkv = F.conv2d(x, module.qkv.weight).detach()
    attended = naive.grid_attention(qkv, module.bias_table.detach(), num_heads=2, grid_size=3)
    expected = F.conv2d(torch.from_numpy(attended), module.project.weight)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def modules():
    return [focal(), grid(), LayerNorm2d(6), LayerNorm2d(6, bias=False, centered=False)]


@pytest.mark.parametrize("index", range(4))
def test_every_parameter_gets_a_gradient(index):
    module = randomize(modules()[index])
    module(torch.randn(2, 6, 7, 9)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("index", range(4))
def test_converted_modules(index, dtype):
    module = randomize(modules()[index])
    x = torch.randn(1, 6, 7, 9)
    expected = module(x)
    converted = copy.deepcopy(module).to(dtype)
    out = converted(x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected.double()).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("index", range(4))
def test_empty_batch(index):
    module = modules()[index]
    out = module(torch.zeros(0, 6, 7, 9))
    assert out.shape == (0, 6, 7, 9)
    out.sum().backward()
    assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("index", range(4))
def test_pickled_modules(index, tmp_path):
    module, x = randomize(modules()[index]), torch.randn(1, 6, 5, 5)
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), module(x))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: focal(channels=6, heads=4), "channels"),
        (lambda: focal(channels=0), "channels"),
        (lambda: focal(heads=0), "num_heads"),
        (lambda: focal(window=0), "window_size"),
        (lambda: focal(window=2.5), "window_size"),
        (lambda: grid(channels=6, heads=4), "channels"),
        (lambda: grid(channels="6"), "channels"),
        (lambda: grid(size=0), "grid_size"),
        (lambda: grid(size=None), "grid_size"),
        (lambda: LayerNorm2d(0), "channels"),
        (lambda: LayerNorm2d(-1), "channels"),
        (lambda: LayerNorm2d(4.0), "channels"),
        (lambda: LayerNorm2d(4, eps=0.0), "eps"),
    ],
)
def test_bad_arguments(build, name):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        build()


@pytest.mark.parametrize("shape", [(6, 5, 5), (1, 1, 6, 5, 5), (1, 6, 0, 5), (1, 5, 5, 5)])
@pytest.mark.parametrize("index", range(4))
def test_bad_images(index, shape):
    with pytest.raises((ValueError, TypeError)):
        modules()[index](torch.zeros(shape))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("centered", [True, False])
def test_layer_norm(bias, centered):
    module = LayerNorm2d(6, eps=1e-3, bias=bias, centered=centered)
    assert torch.equal(module.weight, torch.ones(6))
    assert set(module.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    assert not bias or not module.bias.any()
    randomize(module).double()
    x = 2 * torch.randn(2, 6, 3, 4, dtype=torch.float64) + 1
    parameters = (module.weight.detach(), module.bias.detach() if bias else None)
    expected = torch.from_numpy(naive.layer_norm_2d(x, *parameters, eps=1e-3, centered=centered))
    torch.testing.assert_close(module(x).detach(), expected, rtol=1e-10, atol=1e-10)
    with ipt_fast.use_backend("reference"):
        torch.testing.assert_close(module(x).detach(), expected, rtol=1e-10, atol=1e-10)
