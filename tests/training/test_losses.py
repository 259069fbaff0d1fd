import torch

from ipt_fast.training.losses import charbonnier_loss, l1_loss


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
