"""FCSA and GGSA: initial values, shapes, and equality with their composition."""

import copy

import pytest
import torch
import torch.nn.functional as F

import ipt_fast
from ipt_fast.modules import FocalContextSelfAttention, GlobalGridSelfAttention, LayerNorm2d
from ipt_fast.modules._layer import Modulation, by_modules, reason_against_fusing, residual
from ipt_fast.modules.normalization import ModulatedLayerNorm2d
from tests.oracles import naive

SIZES = [(1, 1), (1, 7), (7, 1), (5, 11), (8, 8)]


def focal(channels=6, heads=2, window=4, **options):
    return FocalContextSelfAttention(channels, heads, window, **options)


def grid(channels=6, heads=2, size=3, **options):
    return GlobalGridSelfAttention(channels, heads, size, **options)


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


def test_the_released_reading_starts_as_the_papers_does():
    """One temperature and token weight for each branch, and shares of a half; the border has the first branch alone."""
    module = focal(attention="released")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes["temperature"] == (2, 2) and shapes["token_weight"] == (2, 2, 4, 4)
    assert shapes["top_weight"] == shapes["bottom_weight"] == (2, 4, 4)
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in module.named_parameters() if "." not in name)
    papers = focal()
    for name in ("qkv", "depthwise", "project"):
        getattr(papers, name).load_state_dict(getattr(module, name).state_dict())
    x = torch.randn(1, 6, 16, 16)
    out, expected = module(x), papers(x)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-5)
    assert (out - expected).abs().amax((0, 1))[:2].min() > 1e-4


def released(module, qkv):
    """(m1 F1 + m2 F2) / (m1 + m2) window by window; m2 = 0 where no window of the second branch lies."""
    p, heads = module.window_size, module.num_heads
    batch, channels, height, width = qkv.shape
    qkv = F.pad(qkv, (0, -width % p, 0, -height % p))
    rows, columns = qkv.shape[2:]
    sums, weights = qkv.new_zeros(2, batch, heads, channels // 3 // heads, rows, columns)
    for branch, (start, m) in enumerate(((0, module.top_weight), (p // 2, module.bottom_weight))):
        for top in range(start, rows - p + 1, p):
            for left in range(start, columns - p + 1, p):
                where = (..., slice(top, top + p), slice(left, left + p))
                q, k, v = qkv[where].reshape(batch, 3, heads, -1, p * p).unbind(1)
                q, k = (F.normalize(t * module.token_weight[branch].reshape(heads, 1, -1), dim=-1) for t in (q, k))
                scores = q @ k.transpose(-1, -2) * module.temperature[branch][:, None, None]
                sums[where] += (scores.softmax(-1) @ v).unflatten(-1, (p, p)) * m[:, None]
                weights[where] += m[:, None]
    return (sums / weights).flatten(1, 2)[..., :height, :width]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (4, 12), (6, 6), (13, 9)])
def test_released_focal_attention_is_its_composition(size, bias):
    module = focal(bias=bias, attention="released").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.rand_like(parameter))
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        qkv = F.conv2d(x, module.qkv.weight, module.qkv.bias)
        qkv = F.conv2d(qkv, module.depthwise.weight, module.depthwise.bias, padding=1, groups=18)
        expected = F.conv2d(released(module, qkv), module.project.weight, module.project.bias)
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [LayerNorm2d(6), ModulatedLayerNorm2d()])
@pytest.mark.parametrize("build", [focal, lambda **options: focal(attention="released", **options), grid])
def test_layers_with_biases(build, norm):
    """As one operator and module by module: output and gradients."""
    branch, x = randomize(build(bias=True)), torch.randn(2, 6, 9, 8)
    modulation = None if isinstance(norm, LayerNorm2d) else Modulation(*torch.randn(3, 2, 6))
    assert set(dict(branch.named_parameters())) >= {"qkv.bias", "project.bias"}
    assert reason_against_fusing(norm, branch) is None
    inputs = [x.requires_grad_(), *branch.parameters()]
    grad = torch.randn(2, 6, 9, 8)
    out, expected = residual(x, norm, branch, modulation), by_modules(x, norm, branch, modulation)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    found, wanted = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-3 * right.abs().max().item() + 1e-5)


def test_a_modulated_norm():
    """Layer norm without affine part, then scale and shift of each image."""
    x, weight, bias = torch.randn(2, 6, 3, 4), torch.randn(2, 6), torch.randn(2, 6)
    normed = F.layer_norm(x.movedim(1, -1), (6,), eps=1e-6).movedim(-1, 1)
    expected = normed * weight[..., None, None] + bias[..., None, None]
    torch.testing.assert_close(ModulatedLayerNorm2d()(x, weight, bias), expected)
    assert not ModulatedLayerNorm2d().state_dict()


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
        (lambda: focal(attention="swin"), "attention"),
        (lambda: focal(window=5, attention="released"), "window_size"),
        (lambda: focal(bias=1), "bias"),
        (lambda: grid(bias=None), "bias"),
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
