"""torch.compile takes operators and models as one graph and recompiles at most once for all image sizes."""

import dataclasses

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.ops._operator import OPERATORS as registry
from tests.models.micro import micro_model
from tests.models.small_restormer import small_restormer
from tests.ops.cases import IMAGES, OPERATORS, build, public

# Batches and sizes above 1; below, equal to and above a window, divisible by 8 or not, odd and prime.
SIZES = [(64, 64), (72, 80), (96, 41), (130, 64), (9, 17)]
# Every kind of layer; fewer of them, as each is traced.
SHALLOW = {"depths": (2, 0, 0, 0)}


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def relative(value, truth):
    return ((value - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("name", ["ipt_v2", "restormer in windows"])
def test_model_recompiles_once_for_all_sizes(name):
    if name == "ipt_v2":
        model = micro_model(merged=True, **SHALLOW)
    else:
        model = small_restormer(depths=(1, 1, 1, 1), refinement=0, training_patch=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for count, size in enumerate(SIZES, 1):
            x = torch.rand(2, 3, *size)
            assert relative(compiled(x), model(x)) < 1e-5
            assert graphs() <= min(count, 2)


def test_training_recompiles_once_for_all_sizes():
    model = micro_model(**SHALLOW).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for count, size in enumerate(SIZES, 1):
        x = torch.rand(2, 3, *size)
        results = []
        for function in (compiled, model):
            model.zero_grad()
            out = function(x)
            out.square().mean().backward()
            results.append((out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        (out, grads), (expected, expected_grads) = results
        assert relative(out, expected) < 1e-5
        for name, value in grads.items():
            assert relative(value, expected_grads[name]) < 1e-3, name
        assert graphs() <= min(count, 2)


def test_model_under_autocast():
    model, x = micro_model(**SHALLOW), torch.rand(2, 3, 24, 17)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out, expected = compiled(x), model(x)
    assert out.dtype == expected.dtype and graphs() == 1
    # The compiled graph always merges inside the forward, eager may run the branches: equal up to rounding.
    assert relative(out.float(), expected.float()) < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_forward_and_backward(operator):
    def function(tensors, options):
        return public(operator, tensors, options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for shape in [(2, 8, 8), (2, 12, 20), (3, 7, 5), (4, 31, 9)]:
        _, tensors, options = build(operator, shape, torch.float32)
        results = []
        for run in (compiled, function):
            leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
            out = run(leaves, options)
            out.square().sum().backward()
            results.append({"out": out.detach(), **{name: value.grad for name, value in leaves.items()}})
        for name, value in results[0].items():
            torch.testing.assert_close(value, results[1][name])
            assert name not in IMAGES | {"out"} or value.stride() == results[1][name].stride()
    assert graphs() <= 3


def test_two_arguments_of_one_shape_of_which_one_is_symbolic():
    x, branch, weight = torch.randn(3, 9, 12), torch.randn(3, 9, 12), torch.randn(20, 12)
    torch._dynamo.maybe_mark_dynamic(x, 0)

    def function(x, branch, weight):
        return ipt_fast.ops.add_norm_projection(x, branch, None, None, weight)

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(x, branch, weight)
    torch.testing.assert_close(found, function(x, branch, weight))


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
def test_the_backend_is_chosen_when_the_compiled_function_runs():
    compiled = torch.compile(ipt_fast.ops.layer_norm_2d, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 6, 5, 5, requires_grad=True)
    compiled(x, torch.ones(6)).sum().backward()
    with ipt_fast.use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        compiled(x, torch.ones(6))
    compiled(x, torch.ones(6)).sum().backward()
    assert graphs() == 1


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
def test_compiled_function_chooses_its_backend_when_it_runs(monkeypatch):
    """Compiled while C++ ran; demanded from the reference later: both directions must follow, and go back again."""
    ran, kernels = [], registry["layer_norm_2d"].kernels
    for backend, kernel in list(kernels.items()):

        def watch(function, entry):
            return lambda *args: (ran.append(entry), function(*args))[1]

        changes = {d: watch(getattr(kernel, d), (backend, d)) for d in ("forward", "backward")}
        monkeypatch.setitem(kernels, backend, dataclasses.replace(kernel, **changes))
    compiled = torch.compile(ipt_fast.ops.layer_norm_2d, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 6, 5, 5, requires_grad=True)
    compiled(x, torch.ones(6)).sum().backward()
    assert ran == [("cpu", "forward"), ("cpu", "backward")]
    with ipt_fast.use_backend("reference"):
        compiled(x, torch.ones(6)).sum().backward()
    assert ran[2:] == [("reference", "forward"), ("reference", "backward")]
    compiled(x, torch.ones(6)).sum().backward()
    assert ran[4:] == [("cpu", "forward"), ("cpu", "backward")]


def test_inductor():
    stage, x = micro_model(merged=True, **SHALLOW).encoder[0], torch.rand(2, 8, 24, 17)
    compiled = torch.compile(stage, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), stage(x)) < 1e-5
