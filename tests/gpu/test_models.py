"""Whole models on a GPU: against the reference, captured in a CUDA graph, compiled, trained."""

import copy

import pytest
import torch

import ipt_fast

pytestmark = pytest.mark.gpu
SIGMA = 25 / 255


def psnr(a, b):
    return -10 * (a - b).square().mean().log10().item()


def on(backend, model, x):
    with ipt_fast.use_backend(backend), torch.inference_mode():
        return model(x).float()


def made(name, merged=True, **config):
    torch.manual_seed(0)
    model = ipt_fast.create_model(name, merged=merged, **config).cuda().to(memory_format=torch.channels_last)
    return model.eval()


@pytest.mark.parametrize(("name", "height", "width"), [("ipt_v2_small", 96, 141), ("ipt_v2_base", 133, 96)])
def test_whole_models(name, height, width):
    model = made(name)
    clean = torch.rand(1, 3, height // 4, width // 4, device="cuda")
    clean = torch.nn.functional.interpolate(clean, (height, width), mode="bicubic").clamp(0, 1)
    noisy = clean + SIGMA * torch.randn_like(clean)
    residual = on("reference", model, noisy) - noisy  # untrained: made as large as a trained model's, the noise
    model.output.weight.data *= SIGMA / residual.std()
    assert (on("triton", model, noisy) - on("reference", model, noisy)).abs().max() < 1e-4
    half, noisy = copy.deepcopy(model).bfloat16(), noisy.bfloat16()
    ours, plain = on("triton", half, noisy), on("reference", half, noisy)
    assert psnr(ours, plain) > 50
    assert abs(psnr(ours, clean) - psnr(plain, clean)) < 0.02


def ipt():
    torch.manual_seed(0)
    return ipt_fast.create_model("ipt", tasks=("sr_x2", "derain"), layers=3).cuda()


def test_ipt(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = ipt().eval(), 255 * torch.rand(5, 3, 48, 48, device="cuda")
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(x.double(), "sr_x2").float()
        scale = truth.abs().max()
        outputs = {}
        for backend in ("triton", "reference"):
            with ipt_fast.use_backend(backend):
                outputs[backend] = model(x, "sr_x2")
                assert (outputs[backend] - truth).abs().max() < 2e-5 * scale
                with torch.autocast("cuda", torch.bfloat16):
                    assert (model(x, "sr_x2") - truth).abs().max() < 0.05 * scale
    graph = torch.cuda.CUDAGraph()
    with ipt_fast.use_backend("triton"), torch.inference_mode(), torch.cuda.graph(graph):
        out = model(x, "sr_x2")
    graph.replay()
    assert torch.equal(out, outputs["triton"])
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, "sr_x2"), outputs["triton"], rtol=1e-4, atol=1e-4 * scale.item())


def test_ipt_trains_as_by_the_reference():
    losses = {}
    for backend in ("triton", "reference"):
        model = ipt().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator("cuda").manual_seed(1)
        with ipt_fast.use_backend(backend):
            for _ in range(20):
                x = 255 * torch.rand(4, 3, 48, 48, device="cuda", generator=generator)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = (model(x, "derain") - x).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.setdefault(backend, []).append(loss.item())
    for ours, plain in zip(losses["triton"], losses["reference"], strict=True):
        assert abs(ours - plain) < 0.03 * plain


@pytest.mark.parametrize("name", ["ipt_v2_small", "ipt_v2_base"])
def test_cuda_graph(name):
    model = made(name).bfloat16()
    x = torch.rand(1, 3, 128, 128, device="cuda", dtype=torch.bfloat16)
    expected = on("triton", model, x)
    graph = torch.cuda.CUDAGraph()
    with ipt_fast.use_backend("triton"), torch.inference_mode(), torch.cuda.graph(graph):
        out = model(x)
    x.copy_(torch.rand_like(x))
    x_changed = on("triton", model, x)
    graph.replay()
    assert torch.equal(out.float(), x_changed) and not torch.equal(x_changed, expected)


def test_compile_fullgraph():
    model = made("ipt_v2_tiny")
    compiled = torch.compile(model, fullgraph=True)
    for size in (64, 72, 80):
        x = torch.rand(1, 3, size, size, device="cuda")
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_follows_the_reference(autocast):
    losses = {}
    for backend in ("triton", "reference"):
        model = made("ipt_v2_tiny", merged=False).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        generator = torch.Generator("cuda").manual_seed(1)
        with ipt_fast.use_backend(backend):
            for _ in range(30):
                clean = torch.rand(2, 3, 64, 64, device="cuda", generator=generator)
                noisy = clean + SIGMA * torch.randn(clean.shape, device="cuda", generator=generator)
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    loss = (model(noisy) - clean).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.setdefault(backend, []).append(loss.item())
    for ours, plain in zip(losses["triton"], losses["reference"], strict=True):
        assert abs(ours - plain) < (0.03 if autocast else 0.01) * plain
