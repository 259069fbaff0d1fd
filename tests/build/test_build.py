"""The compiled modules as installed, the choice of instruction set, and the ways an install can go."""

import importlib.metadata
import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from ipt_fast import _extension
from tests.build.building import (
    ROOT,
    SUFFIX,
    UNSET,
    build_wheel,
    copy_sources,
    library_names,
    run,
    run_installed,
    wheel_of,
)

ONE_COMMAND = "pip install --no-build-isolation ."

compiled = pytest.mark.skipif(not _extension.load(), reason=_extension.error() or "")
KNOWN_LEVELS = torch.ops.ipt_fast_cpu.isa_known() if _extension.load() else []


@pytest.fixture
def checkout(tmp_path):
    return copy_sources(tmp_path / "checkout")


@compiled
def test_build_info():
    info = _extension.build_info()
    assert set(info) == {"compiler", "flags", "cxx_standard", "torch", "cpu_isa", "cuda_compiler", "cuda_architectures"}
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["compiler"].split()[0] in ("GNU", "Clang") and info["cxx_standard"] == 20
    assert "-march=native" not in info["flags"] and "-ffast-math" not in info["flags"]
    # what is not among them has the kernels of another level, and a matrix unit
    assert "generic" in info["cpu_isa"] and set(info["cpu_isa"]) <= set(KNOWN_LEVELS)


@compiled
@pytest.mark.parametrize("level", KNOWN_LEVELS)
def test_isa_is_capped_by_the_environment(level):
    """A fresh process at each level: the level it reports, and its result against the formula in fp64."""
    levels = torch.ops.ipt_fast_cpu.isa_levels()
    script = """
import torch
from ipt_fast import _extension
x = torch.randn(2, 37, 9, 11, generator=torch.Generator().manual_seed(0))
weight, bias = torch.rand(37), torch.rand(37)
out = torch.ops.ipt_fast_cpu.layer_norm_2d(x, weight, bias, 1e-5, True) if _extension.load() else None
x, weight, bias = x.double(), weight.double(), bias.double()
variance, mean = torch.var_mean(x, 1, keepdim=True, unbiased=False)
reference = (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]
print(_extension.isa(), ((out - reference).abs().max() / reference.abs().max()).item())
"""
    process = run(sys.executable, "-c", script, cwd=ROOT, IPT_FAST_CPU_ISA=level)
    assert process.returncode == 0, process.stderr
    used, error = process.stdout.split()
    assert used == [name for name in KNOWN_LEVELS[: KNOWN_LEVELS.index(level) + 1] if name in levels][-1]
    assert float(error) < 4 * torch.finfo(torch.float32).eps


@compiled
@pytest.mark.parametrize("page", ["backends", "install"])
def test_the_docs_name_every_level(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert [level for level in KNOWN_LEVELS if f"`{level}`" not in text] == []


@compiled
@pytest.mark.parametrize("value", ["sse9", "AVX2", " "])
def test_unknown_isa_is_refused(monkeypatch, value):
    monkeypatch.setenv("IPT_FAST_CPU_ISA", value)
    with pytest.raises(ValueError, match=f"IPT_FAST_CPU_ISA must be one of {', '.join(KNOWN_LEVELS)}; got '{value}'"):
        torch.ops.ipt_fast_cpu.isa()
    with pytest.raises(ValueError, match="IPT_FAST_CPU_ISA"):
        torch.ops.ipt_fast_cpu.layer_norm_2d(torch.zeros(1, 1, 1, 1), torch.ones(1), None, 1e-5, True)


def test_import_needs_no_build_tools():
    """The package imports in a process in which no program can be found."""
    process = run(sys.executable, "-c", "import ipt_fast", cwd=ROOT, PATH="")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"IPT_FAST_PURE": "1"}, "IPT_FAST_PURE is set"),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler found (tried /nowhere/c++)"),
        ({"CXX": "false"}, "false cannot compile a C++20 Python module"),
    ],
)
def test_plain_install(checkout, tmp_path, environment, reason):
    """Without a compiler, or on demand, the install succeeds, says so, and the package works and keeps the reason."""
    process, names = build_wheel(checkout, **environment)
    assert process.returncode == 0, process.stderr
    assert f"INSTALLING PLAIN PYTORCH, WITHOUT THE COMPILED KERNELS: {reason}" in process.stdout + process.stderr
    assert library_names(names) == []
    target = tmp_path / "target"
    assert wheel_of(checkout).name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel_of(checkout)).extractall(target)
    (line,) = (target / "ipt_fast/_why_pure.txt").read_text().splitlines()
    assert line.startswith(reason)
    script = """
import ipt_fast
from ipt_fast import _extension
assert not _extension.load() and _extension.isa() is None and _extension.build_info() == {}
print(ipt_fast.__file__, _extension.error())
"""
    assert "not part of this installation" in run_installed(target, script)


def test_isolated_build_names_the_command_that_works(checkout):
    """No torch in sight, as in pip's isolated environment: stop before anything is fetched or built."""
    without_torch = checkout.parent / "site"
    without_torch.mkdir()
    site_packages = Path(sysconfig.get_path("purelib"))
    for package in (*site_packages.glob("setuptools*"), *site_packages.glob("_distutils_hack")):
        (without_torch / package.name).symlink_to(package)
    hook = "import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel('.')"
    # -I -S: neither this environment's packages nor the user's
    program = f"import sys; sys.path.insert(0, {str(without_torch)!r}); {hook}"
    environment = {"CXX": None, "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    process = run(sys.executable, "-I", "-S", "-c", program, cwd=checkout, IPT_FAST_PURE=None, **environment)
    assert process.returncode != 0
    assert ONE_COMMAND in process.stdout + process.stderr
    process = run(sys.executable, "-I", "-S", "-c", program, cwd=checkout, IPT_FAST_PURE="1", **environment)
    assert process.returncode == 0, process.stderr


@compiled
def test_a_compile_error_fails_the_build(checkout):
    """A working compiler that refuses our code is an error to show, not a reason for a plain install."""
    (checkout / "csrc/cpu/kernels.h").write_text('#error "this does not compile"\n')  # all include it
    process, names = build_wheel(checkout, MAX_JOBS="1")
    assert process.returncode != 0 and names is None
    assert "this does not compile" in process.stdout + process.stderr


@compiled
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"IPT_FAST_BUILD": "cpu", "CXX": "false"},
            "IPT_FAST_BUILD=cpu asks for compiled kernels, which cannot be built",
        ),
        ({"IPT_FAST_BUILD": "cpu,tpu"}, "IPT_FAST_BUILD must be cpu, cuda or cpu,cuda; got tpu"),
        ({"IPT_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "7.0 7.5"}, "must name a chip of 8.0 or later"),
        ({"IPT_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "Hopper"}, "such as 8.0+PTX 9.0a; got 'Hopper'"),
        pytest.param(
            {"FORCE_CUDA": "1", "PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere", "CUDACXX": None},
            "there is no nvcc",
            marks=pytest.mark.skipif("shutil.which('nvcc', path='/usr/bin:/bin')", reason="nvcc is everywhere"),
        ),
    ],
)
def test_wrong_wishes_are_refused(checkout, environment, said):
    process = run(sys.executable, "setup.py", "build_ext", cwd=checkout, **(UNSET | environment))
    assert process.returncode != 0 and said in process.stderr


def broken_package(folder, torch_version, library):
    """A copy of the Python package with a library that is not the right one."""
    shutil.copytree(ROOT / "ipt_fast", folder / "ipt_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "ipt_fast" / f"_C{SUFFIX}").write_bytes(library)
    (folder / "ipt_fast/_build_info.py").write_text(f"def build_info():\n    return {{'torch': {torch_version!r}}}\n")
    script = "import ipt_fast; from ipt_fast import _extension as e; print(e.__file__, e.load(), e.error())"
    said = run_installed(folder, script)
    assert " False " in said
    return said


def test_a_damaged_library_keeps_its_error_text(tmp_path):
    assert "cannot be loaded:" in (said := broken_package(tmp_path, torch.__version__, b"not a library"))
    assert "invalid ELF header" in said or "file too short" in said


def test_a_library_for_another_torch_is_not_loaded(tmp_path):
    said = broken_package(tmp_path, "1.0.0", b"not a library")
    assert f"was built for torch 1.0.0, this is torch {torch.__version__}" in said and ONE_COMMAND in said


def test_console_script():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="ipt-fast")
    assert [script.value for script in scripts] == ["ipt_fast.cli:main"]
