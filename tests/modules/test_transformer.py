"""Layers of the IPT body on every backend: with Triton's fused residual and norm as with PyTorch's own kernels.

tests/interpreter runs this file with Triton's interpreter, tests/gpu on a GPU.
"""

import copy

import pytest
import torch

import ipt_fast
from ipt_fast.modules import transformer
from ipt_fast.modules.transformer import DecoderLayer, EncoderLayer
from ipt_fast.ops import _aten
from ipt_fast.ops.add_norm_feed_forward import linear_relu
from tests.ops import cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = ipt_fast.explain(
    "layer_norm_2d", torch.rand(1, 4, 2, 2, device=cases.DEVICE), torch.ones(4, device=cases.DEVICE)
)
TRITON = TRITON["layer_norm_2d"]["triton"]
needs_triton = pytest.mark.skipif(TRITON is not None, reason=f"needs the backend triton: {TRITON}")


class Body(torch.nn.Module):
    """An encoder and a decoder layer, the embeddings of a task and of positions."""

    def __init__(self, dim=36, tokens=25, positions=True, norm=True):
        super().__init__()
        self.encoder, self.decoder = EncoderLayer(dim, 3, norm=norm), DecoderLayer(dim, 3, norm=norm)
        self.task = torch.nn.Parameter(torch.randn(tokens, dim))
        self.positions = torch.nn.Parameter(torch.randn(tokens, dim)) if positions else None
        for name, value in self.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(value, mean=1.0, std=0.3)

    def forward(self, x):
        memory = self.encoder(x, self.positions)
        return self.decoder(memory, memory, self.task, self.positions)


def body(dtype, **options):
    torch.manual_seed(0)
    return Body(**options).to(cases.DEVICE, dtype)


def results(body, x, grad, backend, autocast=None):
    """{"out": ..., and gradients by name}."""
    x = x.detach().clone().requires_grad_()
    body.zero_grad()
    with ipt_fast.use_backend(backend), torch.autocast(cases.DEVICE, autocast, enabled=autocast is not None):
        out = body(x)
        out.backward(grad.to(out.dtype))
    return {"out": out.detach(), "x": x.grad, **{name: value.grad for name, value in body.named_parameters()}}


def check(dtype, backend="triton", autocast=None, **options):
    ours = body(dtype, **options)
    x, grad = (torch.randn(3, 25, 36, dtype=torch.float64).to(cases.DEVICE, dtype) for _ in range(2))

    def plain(computed, grad, tensors):
        """In float64, or as ``ours`` computes but module by module."""
        weights, wide = {**tensors}, computed == torch.float64
        x, near = weights.pop("x"), copy.deepcopy(ours).to(computed if wide else dtype)
        near.load_state_dict(weights)
        near.encoder.plain = near.decoder.plain = True
        return results(near, x.to(computed) if wide else x, grad, "auto", None if wide else autocast)

    tensors = {"x": x, **{name: value.detach() for name, value in ours.named_parameters()}}
    base = cases.Baseline(plain, autocast or dtype, grad, tensors)
    cases.assert_within_rule(results(ours, x, grad, backend, autocast), plain(torch.float64, grad, tensors), base)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_on_triton(dtype):
    check(dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_layers_on_triton_under_autocast(dtype):
    check(torch.float32, autocast=dtype)


@needs_triton
def test_layers_without_positions_and_without_norms():
    check(torch.float32, positions=False)
    check(torch.float32, norm=False)


@needs_triton
def test_a_stream_of_other_strides_on_triton():
    ours, x = body(torch.float32), torch.randn(36, 25, 2, device=cases.DEVICE).permute(2, 1, 0)
    with ipt_fast.use_backend("triton"), torch.no_grad():
        assert torch.equal(ours(x), ours(x.contiguous()))


@needs_triton
def test_empty_batch_on_triton():
    ours = body(torch.float32)
    empty = torch.rand(0, 25, 36, device=cases.DEVICE)
    found = results(ours, empty, empty, "triton")
    assert found["out"].shape == (0, 25, 36) and all(not value.any() for value in found.values())


@needs_triton
def test_the_kernels_ran(monkeypatch):
    names = []
    monkeypatch.setattr(
        _aten._triton, "function", lambda name, of=_aten._triton.function: names.append(name) or of(name)
    )
    x = torch.rand(1, 25, 36, device=cases.DEVICE)
    results(body(torch.float32), x, torch.ones_like(x), "triton")
    # Five norms, twice computed in a step, and their backward.
    assert names.count("add_layer_norm") == 10 and names.count("add_layer_norm_backward") == 5


@pytest.mark.skipif(TRITON is None, reason="the backend triton runs here")
def test_a_demanded_backend_that_cannot_run_is_refused():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"), ipt_fast.use_backend("triton"):
        body(torch.float32)(torch.rand(1, 25, 36))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_linear_relu(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(12)
    x, weight, bias = (each.to(cases.DEVICE, dtype) for each in (x, weight, bias))
    expected = torch.relu(x.double() @ weight.double().T + bias.double())
    error = (linear_relu(x, weight, bias).double() - expected).abs().max()
    assert error < 8 * torch.finfo(dtype).eps * expected.abs().max()


CPU = ipt_fast.explain("grid_attention")["grid_attention"]["cpu"]
on_a_cpu = pytest.mark.skipif(CPU is not None or cases.DEVICE != "cpu", reason=f"needs the backend cpu: {CPU}")


@on_a_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_by_the_core_for_grids(dtype, autocast):
    """Backend auto against backend reference, whose attention is SDPA."""
    half = dtype if autocast and dtype != torch.float32 else None
    check(torch.float32 if autocast else dtype, "auto", half)


@on_a_cpu
def test_when_the_core_for_grids_attends(monkeypatch):
    ran = []
    core = transformer.attend_as_a_grid
    monkeypatch.setattr(transformer, "attend_as_a_grid", lambda *args: ran.append(args[0].dtype) or core(*args))

    def runs(dtype=torch.float32, tokens=25, backend="auto", gradients=True, batch=1):
        ran.clear()
        layer = EncoderLayer(36, 3).to(dtype)
        with ipt_fast.use_backend(backend), torch.set_grad_enabled(gradients):
            layer(torch.rand(batch, tokens, 36, dtype=dtype))
        return bool(ran)

    assert runs() and runs(gradients=False) and runs(backend="cpu") and runs(tokens=256)
    assert runs(torch.bfloat16) and not runs(torch.bfloat16, gradients=False)
    assert not any((runs(tokens=24), runs(tokens=289), runs(backend="reference"), runs(torch.float64), runs(batch=0)))
    assert not runs(torch.float64, backend="cpu")  # which is no error: SDPA attends
