"""Accelerated modules beside the plain ones: outputs and the gradients of the input and of all parameters."""

import copy

import torch
from torch.func import functional_call

from ipt_fast import accelerate
from tests.ops.cases import Baseline, assert_within_rule


def randomise(module, seed=0):
    """Random parameters about as large as those of a trained model, and random statistics of batch norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like, scale):
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.dim() > 1 and "table" not in name and value.shape[0] > 1 and not name.endswith("temperature"):
                value.copy_(normal(value, value[0].numel() ** -0.5))
            elif name.endswith("bias") or "table" in name or not value.mean().abs() > 0.5:
                value.copy_(normal(value, 0.3))
            else:
                value.copy_(1 + normal(value, 0.3).clamp(-0.9, 0.9))
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.copy_(normal(part.running_mean, 0.3))
                part.running_var.copy_(1 + normal(part.running_var, 0.3).clamp(-0.9, 0.9))
    return module


def assert_as_plain(module, shape, dtype, *, known, others=(), training=False):
    """``module`` (float64) accelerated and plain on a random input, by the error rule.

    Compared are the output, the gradients, and the running statistics of batch norms.

    Args:
        shape: of the input.
        known: number of modules of it that rules must take.
        others: what its forward takes beside.
    """
    module.train(training)
    plain = copy.deepcopy(module)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    tensors = {"x": x, **{name: value.detach().to(dtype) for name, value in module.named_parameters()}}
    report = accelerate(module.to(dtype), verify=False)
    assert [len(report.accelerated), len(report.rows)] == [known, known], str(report)
    grad = torch.randn(module(x, *others).shape, dtype=torch.float64).to(dtype)

    def results(model, dtype, grad, tensors):
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in tensors.items()}
        parameters = {name: value for name, value in leaves.items() if name != "x"}
        statistics = {name: value.to(dtype).clone() for name, value in plain.named_buffers() if "running" in name}
        out = functional_call(model, parameters | statistics, (leaves["x"], *others))
        found = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype), materialize_grads=True)
        return {"out": out.detach(), **by_layer(dict(zip(leaves, found, strict=True))), **statistics}

    models = {torch.float64: plain, dtype: copy.deepcopy(plain).to(dtype)}

    def run(dtype, grad, tensors):
        return results(models[dtype], dtype, grad, tensors)

    got = results(module, dtype, grad, tensors)
    assert_within_rule(got, run(torch.float64, grad, tensors), Baseline(run, dtype, grad, tensors))


def by_layer(gradients):
    """Gradients of weights and biases of one layer as one: those of a bias alone may be zero, or one number."""
    for name in [name for name in gradients if name.endswith(".bias")]:
        weight = f"{name.removesuffix('bias')}weight"
        if weight in gradients:
            gradients[weight] = torch.cat([gradients[weight].flatten(), gradients.pop(name).flatten()])
    return gradients
