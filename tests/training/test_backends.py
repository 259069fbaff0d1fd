"""Training on the C++ kernels and on plain PyTorch: the same losses."""

import pytest
import torch

import ipt_fast
from ipt_fast import _extension

pytestmark = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))


def losses(backend, steps, size):
    """The loss of every step of denoising smooth random pictures, and of an exponential average of the weights."""
    torch.manual_seed(0)
    model = ipt_fast.create_model("ipt_v2_tiny")
    average = ipt_fast.create_model("ipt_v2_tiny")
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    generator = torch.Generator().manual_seed(1)

    def batch():
        coarse = torch.rand(2, 3, 6, 6, generator=generator)
        clean = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
        return clean, clean + 0.1 * torch.randn(clean.shape, generator=generator)

    trained, averaged = [], []
    with ipt_fast.use_backend(backend):
        for step in range(steps):
            clean, noisy = batch()
            loss = (model(noisy) - clean).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for target, source in zip(average.parameters(), model.parameters(), strict=True):
                target.data.lerp_(source.data, 0.05)
            trained.append(loss.item())
            if step % 10 == 9:
                with torch.no_grad():
                    averaged.append((average(noisy) - clean).abs().mean().item())
    return torch.tensor(trained), torch.tensor(averaged)


@pytest.mark.parametrize(
    ("steps", "size"), [(30, 24), pytest.param(200, 64, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_loss_curves_agree_within_a_percent(steps, size):
    """With fused AdamW and an average written through .data, neither of which moves a version counter."""
    for ours, plain in zip(losses("cpu", steps, size), losses("reference", steps, size), strict=True):
        assert ours[-1] < ours[0]
        assert ((ours - plain).abs() / plain).max() < 0.01
