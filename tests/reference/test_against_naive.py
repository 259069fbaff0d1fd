"""The reference operators against the independent naive formulations, in fp64."""

import numpy as np
import pytest
import torch

from ipt_fast import reference
from tests.oracles import naive

# Divisible, non-divisible, prime, one side or both below the window or grid, a single row, a single pixel.
SIZES = [(8, 8), (4, 12), (7, 9), (5, 11), (3, 7), (2, 3), (1, 6), (1, 1)]
HEADS = [(1, 2), (2, 6), (3, 3)]  # (heads, channels)


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def assert_equal(actual, expected):
    expected = torch.from_numpy(expected)
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max()
    assert difference <= 1e-10 * expected.abs().max(), f"largest difference {difference:.3e}"


def focal_arguments(heads, channels, size, p, batch=1):
    """qkv, temperature and the three maps, no two of them equal, so that a mix-up shows."""
    return (
        random(batch, 3 * channels, *size),
        torch.linspace(0.5, 2.0, heads, dtype=torch.float64),
        1 + 0.5 * random(heads, p, p, seed=1),
        random(heads, p, p, seed=2),
        random(heads, p, p, seed=3),
    )


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 2, 2), (1, 16, 1, 1)])
def test_layer_norm_2d(shape, bias, centered):
    x, weight = 3 * random(*shape) + 1, random(shape[1], seed=1)
    bias = random(shape[1], seed=2) if bias else None
    for eps in (1e-5, 1e-2):
        actual = reference.layer_norm_2d(x, weight, bias, eps=eps, centered=centered)
        assert_equal(actual, naive.layer_norm_2d(x, weight, bias, eps=eps, centered=centered))


@pytest.mark.parametrize("window", [None, 4, 3, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("heads", "channels"), HEADS)
def test_channel_attention(heads, channels, size, window):
    q, k, v = (random(2, channels, *size, seed=seed) for seed in range(3))
    temperature = torch.linspace(0.5, 3.0, heads, dtype=torch.float64)
    expected = naive.channel_attention(q, k, v, temperature, num_heads=heads, window_size=window)
    for shape in [(heads,), (heads, 1, 1)]:
        actual = reference.channel_attention(q, k, v, temperature.reshape(shape), num_heads=heads, window_size=window)
        assert_equal(actual, expected)


@pytest.mark.parametrize("p", [4, 3, 5, 2, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("heads", "channels"), HEADS)
def test_focal_channel_attention(heads, channels, size, p):
    arguments = focal_arguments(heads, channels, size, p)
    expected = naive.focal_channel_attention(*arguments, num_heads=heads, window_size=p)
    assert_equal(reference.focal_channel_attention(*arguments, num_heads=heads, window_size=p), expected)


def test_focal_channel_attention_of_a_batch():
    arguments = focal_arguments(2, 4, (7, 5), 4, batch=2)
    expected = naive.focal_channel_attention(*arguments, num_heads=2, window_size=4)
    assert_equal(reference.focal_channel_attention(*arguments, num_heads=2, window_size=4), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("g", [4, 3, 2, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("heads", "channels"), HEADS)
def test_grid_attention(heads, channels, size, g, bias):
    qkv = random(2, 3 * channels, *size)
    bias_table = random((2 * g - 1) ** 2, heads, seed=1) if bias else None
    expected = naive.grid_attention(qkv, bias_table, num_heads=heads, grid_size=g)
    assert_equal(reference.grid_attention(qkv, bias_table, num_heads=heads, grid_size=g), expected)


@pytest.mark.parametrize("kernel", [5, 3, 1, 7])
@pytest.mark.parametrize("size", [(5, 6), (7, 3), (1, 4), (1, 1)])
def test_leffn(size, kernel):
    x = random(2, 3, *size)
    weights = random(6, 3, 1, 1, seed=1), random(6, 1, kernel, kernel, seed=2), random(4, 6, 1, 1, seed=3)
    assert_equal(reference.leffn(x, *weights), naive.leffn(x, *weights))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("offset", [None, 1, 5])
def test_projections_of_tokens(offset, norm):
    x, branch, weight = random(2, 3, 4), random(2, 3, 4, seed=1), random(5, 4, seed=2)
    parameters = (random(4, seed=3), random(4, seed=4)) if norm else (None, None)
    offset = None if offset is None else random(3, offset, seed=5)
    actual = reference.norm_projection(x, *parameters, weight, offset, eps=1e-3)
    assert_equal(actual, naive.norm_projection(x, *parameters, weight, offset, eps=1e-3))
    actual = reference.add_norm_projection(x, branch, *parameters, weight, offset, eps=1e-3)
    for found, expected in zip(
        actual, naive.add_norm_projection(x, branch, *parameters, weight, offset, eps=1e-3), strict=True
    ):
        assert_equal(found, expected)


@pytest.mark.parametrize("norm", [True, False])
def test_add_norm_feed_forward(norm):
    parameters = (random(4, seed=3), random(4, seed=4)) if norm else (None, None)
    weights = random(7, 4, seed=5), random(7, seed=6), random(4, 7, seed=7), random(4, seed=8)
    arguments = random(2, 3, 4), random(2, 3, 4, seed=1), *parameters, *weights
    total, hidden = reference.add_norm_feed_forward.everything(*arguments)[1:]
    assert torch.equal(total, arguments[0] + arguments[1]) and (hidden >= 0).all() and (hidden == 0).any()
    assert_equal(reference.add_norm_feed_forward(*arguments), naive.add_norm_feed_forward(*arguments))


def test_merge_pointwise():
    first, second = random(5, 3, 1, 1), random(7, 5, 1, 1, seed=1)
    merged = reference.merge_pointwise(first, second)
    assert_equal(merged, naive.merge_pointwise(first, second))
    x = random(1, 3, 2, 3, seed=2)
    stepwise = naive.pointwise(naive.pointwise(x, first), second)
    assert_equal(torch.from_numpy(naive.pointwise(x, merged)), stepwise)


@pytest.mark.parametrize("identity", [True, False])
def test_merge_depthwise(identity):
    k5, k3, k1 = random(4, 1, 5, 5), random(4, 1, 3, 3, seed=1), random(4, 1, 1, 1, seed=2)
    merged = reference.merge_depthwise(k5, k3, k1, identity=identity)
    assert_equal(merged, naive.merge_depthwise(k5, k3, k1, identity=identity))
    x = random(1, 4, 6, 4, seed=3).numpy()
    stepwise = sum(naive.depthwise(x, kernel) for kernel in (k5, k3, k1)) + (x if identity else 0)
    assert_equal(torch.from_numpy(naive.depthwise(x, merged)), stepwise)


DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_window_gives_zeros(dtype):
    """The left 8 of 12 columns are zero: some windows of 4 hold nothing else, plain and shifted ones."""
    qkv = random(1, 12, 8, 12).to(dtype)
    qkv[..., :8] = 0
    qkv.requires_grad_()
    ones, maps = torch.ones(2, dtype=dtype), random(2, 4, 4).to(dtype)
    for out in (
        reference.focal_channel_attention(qkv, ones, maps, maps, maps, num_heads=2, window_size=4),
        reference.channel_attention(*qkv.chunk(3, dim=1), ones, num_heads=2, window_size=4),
    ):
        assert out.dtype == dtype
        assert (out[..., :8] == 0).all()
        assert out.isfinite().all()
        assert (out[..., 8:] != 0).any()
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_map_gives_zeros(dtype):
    qkv, ones, maps = torch.zeros(1, 12, 5, 6, dtype=dtype), torch.ones(2, dtype=dtype), random(2, 4, 4).to(dtype)
    for out in (
        reference.focal_channel_attention(qkv, ones, maps, maps, maps, num_heads=2, window_size=4),
        reference.channel_attention(*qkv.chunk(3, dim=1), ones, num_heads=2),
        reference.grid_attention(qkv, None, num_heads=2, grid_size=4),
    ):
        assert out.dtype == dtype
        assert (out == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lower_precisions_are_rounded_once(dtype):
    """Computed in fp32 from the rounded inputs: half a unit in the last place for the halves, a few for fp32."""
    x = random(1, 6, 5, 7).to(dtype)
    weights = [w.to(dtype) for w in (random(8, 6, 1, 1), random(8, 1, 5, 5, seed=1), random(6, 8, 1, 1, seed=2))]
    qkv = random(1, 18, 5, 7).to(dtype)
    focal = [argument.to(dtype) for argument in focal_arguments(2, 6, (5, 7), 4)]
    table = random(9, 2, seed=1).to(dtype)
    vector = random(6, seed=1).to(dtype)
    for name, arguments, keywords in [
        ("layer_norm_2d", [x, vector], {"centered": False}),
        ("channel_attention", [*qkv.chunk(3, dim=1), focal[1]], {"num_heads": 2}),
        ("focal_channel_attention", focal, {"num_heads": 2, "window_size": 4}),
        ("grid_attention", [qkv, table], {"num_heads": 2, "grid_size": 2}),
        ("leffn", [x, *weights], {}),
    ]:
        actual = getattr(reference, name)(*arguments, **keywords)
        expected = torch.from_numpy(getattr(naive, name)(*(a.double() for a in arguments), **keywords))
        eps = torch.finfo(dtype).eps
        assert actual.dtype == dtype
        bound = 0.51 * eps * expected.abs() if dtype != torch.float32 else 0
        assert ((actual.double() - expected).abs() <= bound + 1e-5 * expected.abs().max()).all(), name


# Gradients: tiny sizes, sides that window and grid do not divide.


def differentiable(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("centered", [True, False])
def test_gradient_of_layer_norm_2d(centered):
    inputs = differentiable(random(2, 4, 2, 3), random(4, seed=1), random(4, seed=2))
    assert torch.autograd.gradcheck(lambda *a: reference.layer_norm_2d(*a, eps=1e-5, centered=centered), inputs)


@pytest.mark.parametrize("window", [None, 2])
def test_gradient_of_channel_attention(window):
    q, k, v = (random(1, 4, 3, 3, seed=seed) for seed in range(3))
    inputs = differentiable(q, k, v, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *a: reference.channel_attention(*a, num_heads=2, window_size=window), inputs)


@pytest.mark.parametrize("p", [2, 3])
def test_gradient_of_focal_channel_attention(p):
    inputs = differentiable(*focal_arguments(2, 4, (3, 4), p))
    assert torch.autograd.gradcheck(
        lambda *a: reference.focal_channel_attention(*a, num_heads=2, window_size=p), inputs
    )


def test_gradient_of_grid_attention():
    inputs = differentiable(random(1, 12, 3, 5), random(9, 2, seed=1))
    assert torch.autograd.gradcheck(lambda *a: reference.grid_attention(*a, num_heads=2, grid_size=2), inputs)


def test_gradient_of_leffn():
    weights = random(4, 2, 1, 1, seed=1), random(4, 1, 5, 5, seed=2), random(2, 4, 1, 1, seed=3)
    assert torch.autograd.gradcheck(reference.leffn, differentiable(random(1, 2, 3, 2), *weights))


def test_gradient_of_the_merges():
    assert torch.autograd.gradcheck(reference.merge_pointwise, differentiable(random(3, 2, 1, 1), random(4, 3, 1, 1)))
    kernels = differentiable(random(2, 1, 5, 5), random(2, 1, 3, 3), random(2, 1, 1, 1))
    assert torch.autograd.gradcheck(reference.merge_depthwise, kernels)
