"""An accelerated model beside the plain one: output and every gradient, by the error rule of the operators."""

import copy
import functools

import torch
from torch.utils import _pytree

import ipt_fast
from tests.ops.cases import Baseline, assert_within_rule, forward_and_gradients


def randomised(model):
    """The model with random parameters, none of them zero, of sizes as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if parameter.dim() != 3 else 1
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def in_dtype(model, dtype):
    """A copy in a dtype that also runs there: masks that plain forwards make in float32 are cast, too."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if hasattr(module, "calculate_mask"):
            module.calculate_mask = functools.partial(_masked_in, dtype, module.calculate_mask)
    return model


def _masked_in(wanted, calculate_mask, *args, **kwargs):
    return _pytree.tree_map(lambda mask: mask.to(wanted), calculate_mask(*args, **kwargs))


def run_of(models):
    """The function that `Baseline` takes: output and gradients of the image and of all parameters, in a dtype."""

    def run(dtype, grad, tensors):
        values = {name: value.to(dtype) for name, value in tensors.items()}

        def call(x, **parameters):
            named = {name.replace("/", "."): value for name, value in parameters.items()}
            return torch.func.functional_call(models(dtype), named, (x,))

        return forward_and_gradients(call, values, {}, grad.to(dtype))

    return run


def assert_same(plain, shape, dtype, rules):
    """Accelerate a copy of a model and compare it with the plain one on an image of that shape.

    Args:
        plain: the model; it is left as it is.
        shape: (B, C, H, W), of any size that the model takes.
        dtype: of the accelerated model.
        rules: names of the rules by which its modules must run.
    """
    example = torch.rand(shape, dtype=torch.float64).to(dtype)
    accelerated = copy.deepcopy(plain).to(dtype)
    report = ipt_fast.accelerate(accelerated, example=example)
    assert {row.rule for row in report.rows} == set(rules), str(report)
    assert set(ipt_fast.explain(accelerated).values()) == {None}

    plain_in = functools.cache(functools.partial(in_dtype, plain))
    parameters = {name.replace(".", "/"): value.detach().to(dtype) for name, value in plain.named_parameters()}
    tensors = {"x": example, **parameters}
    with torch.no_grad():
        grad = torch.randn_like(plain_in(torch.float64)(example.double()))
    run = run_of(plain_in)
    truth, got = run(torch.float64, grad, tensors), run_of(lambda _: accelerated)(dtype, grad, tensors)
    assert_within_rule(got, truth, Baseline(run, dtype, grad, tensors))
