"""The operator of docs/adding_an_operator.md: it runs on the backends that are here, and computes its formula."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import ipt_fast

ROOT = pathlib.Path(__file__).parents[1]

PROGRAM = """
import importlib, runpy, sys
import numpy as np, torch
import ipt_fast
from ipt_fast import _extension, ops, reference
from tests.ops import cases

folder, name, packages = sys.argv[1], "scaled_residual", [reference, ops]
interpreted = _extension.triton_error() is None
if interpreted:
    import ipt_fast.kernels as kernels
    packages.insert(0, kernels)
for package in packages:  # as if the files were there, and the lines in their __init__.py
    place = "kernels" if package.__name__ == "ipt_fast.kernels" else package.__name__.replace(".", "/")
    package.__path__.append(f"{folder}/{place}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    for each in {name, f"{name}_backward"} & vars(module).keys():
        setattr(package, each, getattr(module, each))

tensors = {key: torch.randn(2, 5, 7, 9, dtype=torch.float64) for key in ("x", "update")}
tensors["scale"] = torch.randn(5, dtype=torch.float64)
naive = runpy.run_path(f"{folder}/tests/oracles/naive.py")[name]
expected = naive(*(value.numpy() for value in tensors.values()))
np.testing.assert_allclose(reference.scaled_residual(**tensors).numpy(), expected, rtol=1e-12, atol=1e-12)
torch.library.opcheck(torch.ops.ipt_fast.scaled_residual.default, [t.requires_grad_() for t in tensors.values()])
for bad in ({"scale": torch.ones(4)}, {"update": torch.ones(2, 5, 7, 8)}):
    try:
        ops.scaled_residual(**{key: value.float() for key, value in tensors.items()} | bad)
        raise SystemExit(f"{bad.keys()} should have been refused")
    except ValueError as error:
        assert f"scaled_residual: {next(iter(bad))} must" in str(error), error

for backend in ("reference", *(["triton"] if interpreted else [])):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = cases.cast(tensors, dtype)
        grad = torch.randn(2, 5, 7, 9).to(dtype)
        with ipt_fast.use_backend(backend):
            got = cases.forward_and_gradients(ops.scaled_residual, inputs, {}, grad)
        arguments = name, inputs, {}, grad
        cases.assert_within_rule(got, cases.exact(*arguments), cases.baseline(*arguments))
    print("ran on", backend)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example's files: every block of code whose first line is a comment with a path."""
    folder = tmp_path_factory.mktemp("example")
    text = (ROOT / "docs/adding_an_operator.md").read_text()
    found = re.findall(r"^```(?:python|cpp)\n(?:#|//) (\S+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    for path, code in found:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code)
    assert len(found) == 7
    return folder


def test_python(folder):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ran on reference" in result.stdout
    assert ("ran on triton" in result.stdout) == (ipt_fast._extension.triton_error() is None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(
    "name", ["scaled_residual_kernel.cpp", pytest.param("scaled_residual.cpp", marks=pytest.mark.slow)]
)
def test_cpp(folder, name):
    """It compiles, for the level without instructions of its own."""
    (folder / "levels.h").write_text(
        (ROOT / "csrc/cpu/levels.h.in")
        .read_text()
        .replace("@COMPILED_LEVELS@", "generic")
        .replace("@LEVEL_ROWS@", '{"generic", false, [] { return true; }}')
        .replace("@LEVEL_TABLES@", "&Kernels::generic")
    )
    torch_headers = pathlib.Path(torch.__file__).parent / "include"
    places = [folder, folder / "csrc/cpu", ROOT / "csrc/cpu", ROOT / "csrc", torch_headers]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi", "-Werror=return-type"]
    command += ["-DIPT_FAST_LEVEL=generic", '-DIPT_FAST_VECTORS="vec_generic.h"', *(f"-I{place}" for place in places)]
    result = subprocess.run([*command, folder / "csrc/cpu" / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
