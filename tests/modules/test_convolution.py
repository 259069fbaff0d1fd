"""Convolutions where the processor lacks instructions for 16 bit: the same numbers as PyTorch's, from float32."""

import pytest
import torch
from torch import nn

from ipt_fast.modules import convolution

HALF = [torch.bfloat16, torch.float16]


def pair(dtype, bias=False):
    plain = nn.Conv2d(5, 7, 3, padding=1, bias=bias).to(dtype)
    ours = convolution.Conv2d(5, 7, 3, padding=1, bias=bias).to(dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request, monkeypatch):
    monkeypatch.setattr(convolution, "EMULATED", frozenset(HALF) if request.param else frozenset())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_same_as_pytorch(dtype, bias, emulated):
    plain, ours = pair(dtype, bias)
    x = torch.randn(2, 5, 6, 9, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, got = plain(x), ours(y)
    assert got.dtype == dtype
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got, expected, **tolerance)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(y.grad, x.grad, **tolerance)
    scale = plain.weight.grad.abs().max()
    torch.testing.assert_close(ours.weight.grad / scale, plain.weight.grad / scale, **tolerance)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype, emulated):
    plain, ours = pair(torch.float32)
    x = torch.randn(2, 5, 6, 9)
    with torch.autocast("cpu", dtype):
        expected, got = plain(x), ours(x)
        assert got.dtype == expected.dtype == dtype
        got.float().sum().backward()
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert ours.weight.grad.dtype == torch.float32


def test_emulated_convolution_computes_in_float32(monkeypatch):
    """Rounded once: closer to the exact result than any sum of 16-bit products could guarantee."""
    monkeypatch.setattr(convolution, "EMULATED", frozenset(HALF))
    _, ours = pair(torch.bfloat16)
    x = torch.randn(1, 5, 8, 8, dtype=torch.bfloat16)
    exact = nn.functional.conv2d(x.double(), ours.weight.double(), padding=1)
    # Half a unit in the last place, and what sums in float32 lose.
    half = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 64 * torch.finfo(torch.float32).eps
    assert ((ours(x) - exact).abs() <= half).all()


def test_float64_is_not_cast_by_autocast(emulated):
    plain, ours = pair(torch.float64)
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == plain(x).dtype == torch.float64


@pytest.mark.parametrize("name", ["pixel_shuffle", "pixel_unshuffle"])
def test_shuffles_keep_channels_last(name, monkeypatch):
    """On every device; where PyTorch's own do not, the values are theirs."""
    ours, plain = getattr(convolution, name), getattr(torch.nn.functional, name)
    x = torch.randn(2, 12, 6, 10).to(memory_format=torch.channels_last)
    shuffled = ours(x.to("meta"), 2)
    for kept in (shuffled, torch.cat([shuffled, torch.empty_like(shuffled)], dim=1)):
        assert kept.is_contiguous(memory_format=torch.channels_last)
    assert not ours(x.contiguous().to("meta"), 2).is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(convolution, "_loses_channels_last", lambda x: True)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = ours(leaf, 2), plain(other, 2)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("shape", [(12, 6, 10), (2, 3, 12, 6, 10)])
def test_shuffles_take_any_rank(shape):
    x = torch.randn(shape)
    assert torch.equal(convolution.PixelShuffle(2)(x), torch.nn.functional.pixel_shuffle(x, 2))
    assert torch.equal(convolution.PixelUnshuffle(2)(x), torch.nn.functional.pixel_unshuffle(x, 2))


def test_shuffles_under_vmap():
    x = torch.randn(3, 2, 12, 6, 10, device="meta")
    assert torch.vmap(convolution.PixelShuffle(2))(x).shape == (3, 2, 3, 12, 20)
