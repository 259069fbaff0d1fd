"""An accelerated model beside the plain one: output and every gradient, by the error rule of the operators."""

import copy
import functools

import torch
from torch.utils import _pytree

import ipt_fast
from tests.ops.cases import Baseline, assert_within_rule, forward_and_gradients


def randomised(model):
    """The model with random parameters and statistics, none of them zero, of sizes as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if parameter.dim() != 3 else 1
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def in_dtype(model, dtype):
    """A copy in a dtype that also runs there: masks that plain forwards make in float32 are cast, too."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if hasattr(module, "calculate_mask"):
            module.calculate_mask = functools.partial(_cast, module.calculate_mask, dtype)
    return model


def _cast(function, to, /, *args, **kwargs):
    return _pytree.tree_map_only(torch.Tensor, lambda mask: mask.to(to), function(*args, **kwargs))


def run_of(models):
    """The function that `Baseline` takes: output and gradients of the image and of all parameters, in a dtype.

    With them come the running statistics of batch norms, which a forward in training moves on.
    """

    def run(dtype, grad, tensors):
        model = models(dtype)
        values = {name: value.to(dtype) for name, value in tensors.items()}
        statistics = {name: value.clone() for name, value in model.named_buffers() if "running_" in name}

        def call(x, **parameters):
            named = {name.replace("/", "."): value for name, value in parameters.items()}
            return torch.func.functional_call(model, named | statistics, (x,))

        return by_layer(forward_and_gradients(call, values, {}, grad.to(dtype))) | statistics

    return run


def by_layer(results):
    """The gradients of weight and bias of one layer as one: that of a bias alone may be one number, or zero."""
    for name in [name for name in results if name.endswith("/bias")]:
        weight = f"{name.removesuffix('bias')}weight"
        if weight in results:
            results[weight] = torch.cat([results[weight].flatten(), results.pop(name).flatten()])
    return results


def assert_same(plain, shape, dtype, rules, training=False):
    """Accelerate a copy of a model and compare it with the plain one on an image of that shape.

    Args:
        plain: the model; it is left as it is.
        shape: (B, C, H, W), of any size that the model takes.
        dtype: of the accelerated model.
        rules: names of the rules by which its modules must run.
        training: compare them in training mode.
    """
    example = torch.rand(shape, dtype=torch.float64).to(dtype)
    accelerated = copy.deepcopy(plain).to(dtype)
    report = ipt_fast.accelerate(accelerated, example=example)
    assert {row.rule for row in report.rows} - {"dense convolution"} == set(rules), str(report)
    assert set(ipt_fast.explain(accelerated).values()) == {None}

    plain, accelerated = copy.deepcopy(plain).train(training), accelerated.train(training)
    plain_in = functools.cache(functools.partial(in_dtype, plain))
    parameters = {name.replace(".", "/"): value.detach().to(dtype) for name, value in plain.named_parameters()}
    tensors = {"x": example, **parameters}
    with torch.no_grad():
        grad = torch.randn_like(plain_in(torch.float64)(example.double()))
    run = run_of(plain_in)
    truth, got = run(torch.float64, grad, tensors), run_of(lambda _: accelerated)(dtype, grad, tensors)
    assert_within_rule(got, truth, Baseline(run, dtype, grad, tensors))
