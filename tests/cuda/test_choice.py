"""Where "auto" takes the CUDA kernels, by what was measured and, where nothing was, by what is predicted."""

import dataclasses
import pathlib
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ipt_fast.ops import _cuda, _limits, _select
from ipt_fast.ops._operator import OPERATORS

ROOT = pathlib.Path(__file__).resolve().parents[2]


def taken(monkeypatch, operator, measured, dtype=torch.bfloat16, reason_against_triton=None):
    operator = OPERATORS[operator]
    triton = dataclasses.replace(operator.kernels["triton"], check=lambda args: reason_against_triton)
    monkeypatch.setitem(operator.kernels, "triton", triton)
    monkeypatch.setattr(_cuda, "_measured", lambda device: measured)
    with FakeTensorMode():
        x = torch.empty(1, 96, 4, 4, dtype=dtype, device="cuda")
    return operator.kernels["cuda"].automatic((x, None, 2, 16, 1e-5, True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_as_measured_by_operator_dtype_and_widths(monkeypatch, backend):
    other = {"cuda": "triton", "triton": "cuda"}[backend]
    measured = {"grid_attention_layer": {"bfloat16-96-2-16": backend, "bfloat16-48-2-16": other}}
    assert taken(monkeypatch, "grid_attention_layer", measured) == (backend == "cuda")


def test_as_predicted_where_nothing_was_measured(monkeypatch):
    measured = {"grid_attention_layer": {"bfloat16-48-2-16": "triton"}}
    assert taken(monkeypatch, "grid_attention_layer", measured)
    assert not taken(monkeypatch, "grid_attention_layer", measured, torch.float32)
    assert not taken(monkeypatch, "merge_pointwise", measured)


def test_wherever_triton_cannot_run(monkeypatch):
    assert taken(monkeypatch, "merge_pointwise", {}, reason_against_triton="Triton is not installed")


@pytest.mark.parametrize("option", [None, "gate", "project_bias", "norm"])
def test_triton_gets_the_options_that_the_cuda_kernels_lack(monkeypatch, option):
    operator = OPERATORS["leffn_layer"]
    monkeypatch.setattr(_cuda._extension, "cuda_error", lambda: None)
    monkeypatch.setattr(_cuda, "_device_error", lambda kind, index: None)
    monkeypatch.setattr(_cuda, "_measured", lambda device: {})
    triton = dataclasses.replace(operator.kernels["triton"], check=lambda args: None)
    monkeypatch.setitem(operator.kernels, "triton", triton)
    with FakeTensorMode():
        x, norm, channels = (torch.empty(*shape, device="cuda").bfloat16() for shape in [(2, 32, 4, 4), (2, 32), (32,)])
        weights = [
            torch.empty(*shape, device="cuda").bfloat16() for shape in [(64, 32, 1, 1), (64, 1, 5, 5), (32, 64, 1, 1)]
        ]
    options = [None, None, channels if option == "project_bias" else None, channels if option == "gate" else None]
    args = x, norm if option == "norm" else channels, None, *weights, *options, 1e-5, True
    assert _select.choose(operator, args) == ("cuda" if option is None else "triton")


def test_the_limits_of_a_gpu_are_the_same_in_python_in_the_build_and_in_the_kernels():
    build = (ROOT / "setup.py").read_text()
    kernels = "".join(path.read_text() for path in (ROOT / "csrc/cuda").iterdir())
    for text in (build, kernels):
        kib = re.findall(r"(?i)shared_?memory = (\d+) << 10", text)
        assert [int(n) << 10 for n in kib] == [_cuda.SHARED_MEMORY]
    assert f"gpu.major < {_limits.LEAST_CAPABILITY[0]}" in build and _limits.LEAST_CAPABILITY[1] == 0


def test_limits_get_their_arguments_by_name():
    limits = _limits.by_name(OPERATORS["grid_attention_layer"], lambda grid_size, x: f"{x} {grid_size}")
    assert limits(("x", *[None] * 8, 2, 16, 1e-5, True)) == "x 16"
    with pytest.raises(ValueError):
        _limits.by_name(OPERATORS["grid_attention_layer"], lambda window_size: None)
