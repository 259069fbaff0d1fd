import pytest
import torch

from ipt_fast.training.losses import charbonnier_loss, contrastive_loss, l1_loss


def test_values():
    output, target = torch.tensor([0.0, 3.0]), torch.tensor([4.0, 3.0])
    assert l1_loss(output, target).item() == 2
    expected = ((16 + 0.25) ** 0.5 + 0.5) / 2
    assert abs(charbonnier_loss(output, target, eps=0.5).item() - expected) < 1e-6


def test_charbonnier_has_a_finite_gradient_where_output_and_target_agree():
    output = torch.ones(4, requires_grad=True)
    charbonnier_loss(output, torch.ones(4)).backward()
    assert torch.equal(output.grad, torch.zeros(4))


def test_low_precision_outputs_are_compared_in_fp32():
    output = torch.full((1000,), 0.5, dtype=torch.bfloat16)
    target = torch.full((1000,), 0.501)
    assert l1_loss(output, target).dtype == torch.float32
    assert abs(l1_loss(output, target).item() - 0.001) < 1e-6


def contrastive_by_loops(features):
    """Eq. 5, written out."""

    def likeness(a, b):
        return a @ b / (a.norm() * b.norm())

    batch, patches, _ = features.shape
    total = 0
    for j in range(batch):
        for first in range(patches):
            for second in range(patches):
                own = likeness(features[j, first], features[j, second]).exp()
                others = [likeness(features[j, first], features[k, second]).exp() for k in range(batch) if k != j]
                total -= torch.log(own / sum(others))
    return total / (batch * patches**2)


@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 4, 5), (4, 3, 2)])
def test_contrastive_loss_and_its_gradient(shape):
    torch.manual_seed(0)
    features = torch.randn(shape, requires_grad=True)
    double = features.detach().double().requires_grad_()
    expected = contrastive_by_loops(double)
    loss = contrastive_loss(features)
    assert abs(loss.item() - expected.item()) < 1e-5
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, double)[0].float(), rtol=1e-4, atol=1e-6)
    parts = [contrastive_loss(part, features, i) for i, part in enumerate(features.split(1))]
    torch.testing.assert_close(torch.stack(parts).mean(), loss)


def test_contrastive_loss_is_safe():
    huge = torch.tensor([[[3e15, 0.0]], [[-3e15, 1.0]]])
    assert abs(contrastive_loss(huge).item() - (-2)) < 1e-5  # d is 1 within and -1 between
    zeros = torch.zeros(2, 3, 4, requires_grad=True)
    contrastive_loss(zeros).backward()
    assert zeros.grad.isfinite().all()
    assert contrastive_loss(torch.randn(2, 3, 4).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="features must be of at least 2 images, .*; got 1"):
        contrastive_loss(torch.randn(1, 3, 4))
