"""Which kernel runs: order, demands, reasons, and what `explain` says about it."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import ipt_fast
from ipt_fast import _extension
from ipt_fast.ops import _select
from ipt_fast.ops._operator import OPERATORS as REGISTRY
from tests.ops.cases import CALLS, OPERATORS, as_one, build, public

BACKENDS = {"reference", "cpu", "triton", "cuda"}
needs_extension = pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))


def norm(dtype=torch.float32, **changes):
    tensors = {"x": torch.randn(2, 6, 5, 4, dtype=dtype), "weight": torch.ones(6, dtype=dtype)}
    return ipt_fast.ops.layer_norm_2d(**tensors | changes)


@pytest.fixture
def fast_leffn(monkeypatch):
    """A "cpu" kernel for leffn that takes float32 only; yields a function that changes why it cannot run."""
    reason = []
    reference = REGISTRY["leffn"].kernels["reference"]

    def check(args):
        if args is not None and args[0].dtype != torch.float32:
            return "takes float32 only"
        return reason[-1] if reason else None

    monkeypatch.setitem(REGISTRY["leffn"].kernels, "cpu", dataclasses.replace(reference, check=check))
    return reason.append


def call(operator, dtype=torch.float32):
    _, tensors, options = build(operator, (1, 4, 5), dtype)
    return public(operator, tensors, options)


def test_auto_takes_the_first_that_can_run(fast_leffn, ran):
    call("leffn")
    call("leffn", torch.float64)
    fast_leffn("no")
    call("leffn")
    with ipt_fast.use_backend("auto"):
        call("leffn")
    assert [backend for _, backend, *_ in ran] == ["cpu", "reference", "reference", "reference"]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_layer_norm_is_taken(ran, dtype):
    norm(dtype)
    norm(torch.float64)
    assert [backend for _, backend, *_ in ran] == ["cpu", "reference"]


@pytest.mark.parametrize("call_name", CALLS)
def test_a_demanded_backend_runs_or_tells_why_not(call_name, ran):
    operator, tensors, options = build(call_name, (1, 4, 5), torch.float32)
    table = ipt_fast.explain(operator, **tensors, **options)[operator]
    assert table.keys() == BACKENDS and table["reference"] is None
    for backend, reason in table.items():
        with ipt_fast.use_backend(backend):
            if reason is None:
                public(operator, tensors, options)
                assert ran.pop()[:2] == (operator, backend)
            else:
                with pytest.raises(RuntimeError, match=re.escape(reason)) as caught:
                    public(operator, tensors, options)
                assert operator in str(caught.value) and backend in str(caught.value)
                assert not ran


def test_nothing_falls_back_from_a_demanded_backend(fast_leffn):
    fast_leffn("too hot today")
    with ipt_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="too hot today"):
        call("leffn")


def test_backward_runs_where_the_forward_ran(fast_leffn, ran):
    _, tensors, options = build("leffn", (1, 4, 5), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    with ipt_fast.use_backend("reference"):
        first = public("leffn", leaves, options).sum()
    second = public("leffn", leaves, options).sum()
    with ipt_fast.use_backend("reference"):
        second.backward()
    first.backward()
    assert [entry[1:3] for entry in ran] == [
        ("reference", "forward"),
        ("cpu", "forward"),
        ("cpu", "backward"),
        ("reference", "backward"),
    ]


@pytest.mark.parametrize("call_name", OPERATORS)
def test_a_training_forward_chooses_its_backend_once(call_name, monkeypatch):
    operator, tensors, options = build(call_name, (1, 4, 5), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    chosen, choose = [], _select.choose

    def counted(operator, args, demanded=None):
        chosen.append((operator.name, demanded))
        return choose(operator, args, demanded)

    monkeypatch.setattr(_select, "choose", counted)
    out = public(operator, leaves, options)
    assert chosen == [(operator, None)]
    out.sum().backward()
    [_, (_, demanded)] = chosen
    assert demanded in BACKENDS


@pytest.mark.parametrize("call_name", OPERATORS)
def test_selective_checkpointing_keeps_outputs(call_name):
    """Stored outputs come without a forward, so that nothing remembers where one ran."""
    operator, tensors, options = build(call_name, (1, 4, 5), torch.float64)
    leaves = [value.requires_grad_() for value in tensors.values()]

    def function(*values):
        return public(operator, dict(zip(tensors, values, strict=True)), options).square()

    saves = [getattr(torch.ops.ipt_fast, operator).default]
    out = torch.utils.checkpoint.checkpoint(
        function,
        *leaves,
        use_reentrant=False,
        context_fn=lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(saves),
    )
    got = torch.autograd.grad(out.sum(), leaves)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_extension
def test_backward_of_layer_norm_leaves_the_block(ran):
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with ipt_fast.use_backend("reference"):
        out = ipt_fast.ops.layer_norm_2d(x, torch.ones(3))
    out.sum().backward()
    ipt_fast.ops.layer_norm_2d(x, torch.ones(3)).sum().backward()
    assert [entry[1] for entry in ran] == ["reference", "reference", "cpu", "cpu"]


def test_blocks_nest_and_end_with_exceptions(fast_leffn, ran):
    with ipt_fast.use_backend("reference"):
        call("leffn")
        with ipt_fast.use_backend("cpu"):
            call("leffn")
        call("leffn")
        with pytest.raises(KeyError), ipt_fast.use_backend("cpu"):
            raise KeyError
        call("leffn")
    call("leffn")
    with pytest.raises(RuntimeError), ipt_fast.use_backend("cuda"):
        call("leffn")
    call("leffn")
    assert [entry[1] for entry in ran] == ["reference", "cpu", "reference", "reference", "cpu", "cpu"]


def test_a_block_holds_for_its_thread_only(fast_leffn, ran):
    with ipt_fast.use_backend("reference"):
        thread = threading.Thread(target=call, args=("leffn",))
        thread.start()
        thread.join()
        call("leffn")
    assert [entry[1] for entry in ran] == ["cpu", "reference"]


@pytest.mark.parametrize("name", ["", "Reference", "gpu", "cpu ", None, 3])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of auto, .*reference"):
        ipt_fast.use_backend(name)


def test_environment_variable(fast_leffn, ran, monkeypatch):
    monkeypatch.setenv("IPT_FAST_BACKEND", "reference")
    call("leffn")
    with ipt_fast.use_backend("cpu"):
        call("leffn")
    with ipt_fast.use_backend("auto"):
        call("leffn")
    monkeypatch.setenv("IPT_FAST_BACKEND", "quantum")
    with pytest.raises(ValueError, match="IPT_FAST_BACKEND must be one of .*'quantum'"):
        call("leffn")
    assert [entry[1] for entry in ran] == ["reference", "cpu", "cpu"]


@pytest.mark.parametrize(
    ("value", "expected"), [("reference", "fine"), ("triton", "RuntimeError"), ("no", "ValueError")]
)
def test_environment_variable_of_the_process(value, expected):
    program = """
import torch, ipt_fast
try:
    ipt_fast.ops.leffn(torch.ones(1, 2, 3, 3), torch.ones(4, 2, 1, 1), torch.ones(4, 1, 3, 3), torch.ones(2, 4, 1, 1))
    print("fine")
except Exception as error:
    print(type(error).__name__)
"""
    environment = os.environ | {"IPT_FAST_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]


def test_explain_without_arguments():
    table = ipt_fast.explain()
    assert set(table) == set(OPERATORS)
    for operator, row in table.items():
        assert row.keys() == BACKENDS
        assert row["reference"] is None
        assert all(reason is None or (isinstance(reason, str) and reason) for reason in row.values())
        assert ipt_fast.explain(operator) == {operator: row}
        assert ipt_fast.explain(getattr(ipt_fast.ops, operator)) == {operator: row}
    assert table["leffn"]["cuda"]


@needs_extension
def test_explain_for_arguments():
    def reason(dtype, **options):
        x, weight = torch.randn(1, 4, 3, 3, dtype=dtype), torch.ones(4, dtype=dtype)
        return ipt_fast.explain(ipt_fast.ops.layer_norm_2d, x, weight, **options)["layer_norm_2d"]["cpu"]

    assert reason(torch.float32) is None
    assert reason(torch.float16, eps=1e-6, centered=False) is None
    assert "float64" in reason(torch.float64)


def test_explain_of_a_bad_call():
    x = torch.ones(1, 4, 3, 3)
    with pytest.raises(ValueError, match="op must be one of .*leffn.*'nothing'"):
        ipt_fast.explain("nothing")
    with pytest.raises(ValueError, match="op must be one of"):
        ipt_fast.explain(print)
    with pytest.raises(TypeError, match="weight"):
        ipt_fast.explain("layer_norm_2d", x)
    with pytest.raises(TypeError, match="colour"):
        ipt_fast.explain("layer_norm_2d", x, x, colour=1)
    with pytest.raises(TypeError):
        ipt_fast.explain(None, x)


@pytest.mark.parametrize("arguments", [("abc", torch.ones(4)), (None, torch.ones(4)), (3, 4)])
def test_explain_of_arguments_that_are_no_tensors(arguments):
    with pytest.raises(TypeError, match="x"):
        ipt_fast.explain("layer_norm_2d", *arguments)


def test_a_broken_extension_keeps_its_error(monkeypatch):
    text = "the compiled extension cannot be loaded: libgomp.so.1: undefined symbol: _Zfoo"
    monkeypatch.setattr(_extension, "error", lambda: text)
    assert ipt_fast.explain("layer_norm_2d")["layer_norm_2d"]["cpu"] == text
    assert norm().shape == (2, 6, 5, 4)
    with ipt_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="undefined symbol: _Zfoo"):
        norm()


def test_import_needs_no_extension_and_no_extras():
    """A bare `import ipt_fast` in a process where the extension and every optional package are missing."""
    program = """
import sys
extras = ("triton", "tifffile", "imagecodecs", "matplotlib", "timm", "torchvision")
for name in ("ipt_fast._C", "ipt_fast._build_info", *extras):
    sys.modules[name] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("ipt_fast._C", "ipt_fast._build_info") else real(name, *a)
import torch, ipt_fast
reason = ipt_fast.explain("layer_norm_2d")["layer_norm_2d"]["cpu"]
assert "not part of this installation" in reason, reason
assert ipt_fast.ops.layer_norm_2d(torch.ones(1, 2, 3, 3), torch.ones(2)).shape == (1, 2, 3, 3)
assert callable(ipt_fast.restore)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names():
    for name in ("list_models", "create_model", "load_checkpoint", "use_backend", "explain", "restore"):
        assert callable(getattr(ipt_fast, name)), name
    assert set(ipt_fast.modules.__all__) == {
        "FocalContextSelfAttention",
        "GatedFeedForward",
        "GlobalGridSelfAttention",
        "LayerNorm2d",
        "RepLeFFN",
        "TransposedAttention",
    }
    with pytest.raises(AttributeError, match="nonsense"):
        ipt_fast.nonsense  # noqa: B018


@pytest.mark.parametrize("operator", OPERATORS)
def test_references_take_the_same_arguments(operator):
    """`ipt_fast.reference.<op>` stands in for `ipt_fast.ops.<op>`, by position and by name."""
    _, tensors, options = build(operator, (1, 4, 5), torch.bfloat16)
    reference = getattr(ipt_fast.reference, operator)
    with ipt_fast.use_backend("reference"):
        expected = public(operator, tensors, options)
    values, parameters = tensors | options, inspect.signature(reference).parameters.values()
    names = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY and each.name in values]
    others = {name: value for name, value in values.items() if name not in names}
    assert torch.equal(as_one(reference(*(values[name] for name in names), **others)), expected)
    assert torch.equal(as_one(reference(**tensors, **options)), expected)


def test_use_backend_can_be_entered_again_and_nested():
    demand = ipt_fast.use_backend("reference")
    for _ in range(2):
        with demand, demand:
            assert _select.policy() == "reference"
        assert _select.policy() == "auto"
