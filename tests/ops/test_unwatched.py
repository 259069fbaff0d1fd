"""Operators skip the dispatcher where it would add nothing, and nowhere else."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ipt_fast import ops
from ipt_fast.ops._kernel import unwatched
from ipt_fast.ops._operator import OPERATORS as REGISTRY
from tests.ops.cases import CALLS, DEVICE, build, outputs

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on GPUs the dispatcher is never skipped")

NORM = REGISTRY["layer_norm_2d"]
X, WEIGHT = torch.rand(2, 4, 5, 6), torch.rand(4)


@contextlib.contextmanager
def dispatched(operator):
    """A mock that counts the calls through the dispatcher."""
    with mock.patch.object(operator, "_forward_op", wraps=operator._forward_op) as calls:
        yield calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_the_same_without_the_dispatcher(call, half, mode):
    operator, tensors, options = build(call, (2, 7, 9), torch.float32)
    with torch.autocast("cpu", half, enabled=half is not None):
        with dispatched(REGISTRY[operator]) as calls:
            expected = outputs(operator, tensors, options)
        assert calls.call_count >= 1
        with dispatched(REGISTRY[operator]) as calls, mode():
            found = outputs(operator, tensors, options)
        assert calls.call_count == 0
    for out, wanted in zip(found, expected, strict=True):
        assert torch.equal(out, wanted) and out.stride() == wanted.stride() and out.dtype == wanted.dtype
        assert out.is_inference() == (mode is torch.inference_mode) and not out.requires_grad


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


WATCHING = {
    "gradients": torch.enable_grad,
    "functions": Functions,
    "dispatches": Dispatches,
    "FLOPs": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("name", WATCHING)
def test_whoever_watches_sees_the_operator(name):
    with torch.no_grad():
        assert unwatched()
        with WATCHING[name](), dispatched(NORM) as calls:
            assert not unwatched()
            ops.layer_norm_2d(X, WEIGHT)
        assert calls.call_count == 1
        assert unwatched()


def test_subclasses_see_the_operator():
    class Named(torch.Tensor):
        pass

    with torch.no_grad(), dispatched(NORM) as calls:
        out = ops.layer_norm_2d(X.as_subclass(Named), WEIGHT)
    assert calls.call_count == 1 and type(out) is Named


@pytest.mark.filterwarnings("ignore")
def test_traces_contain_the_operator():
    def run(x):
        return ops.layer_norm_2d(x, WEIGHT)

    with torch.no_grad():
        for pre_dispatch in (False, True):
            graph = make_fx(run, pre_dispatch=pre_dispatch)(X)
            assert any("ipt_fast.layer_norm_2d" in str(node.target) for node in graph.graph.nodes)
        traced = torch.jit.trace(run, X)
        assert "ipt_fast::layer_norm_2d" in str(traced.graph) and torch.equal(traced(X), run(X))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize, lambda f: lambda x: torch.func.vjp(f, x)])
def test_transforms_watch(transform):
    found = []

    def run(x):
        found.append(unwatched())
        return 2 * x

    with torch.no_grad():
        transform(run)(X)
    assert found == [False]
