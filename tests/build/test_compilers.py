"""Which compilers, launchers and generators the build takes, and what it refuses before and after compiling."""

import os
import shutil
import sys

import pytest

from ipt_fast import _extension
from tests.build.building import SUFFIX, UNSET, build_wheel, copy_small_sources, library_names, run, succeed

pytestmark = pytest.mark.skipif(not _extension.load(), reason=_extension.error() or "")

GCC = shutil.which("g++") or shutil.which("c++")
LIBRARIES = [f"ipt_fast/_C{SUFFIX}", f"ipt_fast/_build_info{SUFFIX}"]
# For gcc and -fopenmp: a call of a runtime that is not gcc's, or no header of one.
OTHER_RUNTIME = 'extern "C" void __kmpc_fork_call(); static void (*volatile call)() = __kmpc_fork_call;'
NO_HEADER = "#error \"'omp.h' file not found\""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small checkout that the tests of this module build one after the other."""
    return copy_small_sources(tmp_path_factory.mktemp("compilers") / "checkout")


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def write_launcher(folder):
    """A program that notes the command line that it runs, and the file with the notes."""
    log = folder / "log"
    return write_program(folder / "launch", f'echo "$@" >> {log}; exec "$@"'), log


def write_compiler(folder, included, name="compiler"):
    """gcc, which for OpenMP includes some text in front."""
    (folder / "front.h").write_text(included + "\n")
    front = f'case " $* " in *" -fopenmp "*) exec {GCC} -include {folder}/front.h "$@";; esac'
    return write_program(folder / name, f'{front}; exec {GCC} "$@"')


def test_launchers_and_generators(small, tmp_path):
    """A launcher in CXX runs every compilation; CMake's generator can be chosen, and CMAKE_ARGS are heeded."""
    launcher, log = write_launcher(tmp_path)
    process, names = build_wheel(
        small,
        CXX=f"{launcher} {GCC} -DIPT_FAST_OPTION",
        CXXFLAGS="-DIPT_FAST_FLAG",
        CMAKE_GENERATOR="Unix Makefiles",
        CMAKE_BUILD_TYPE="None",
        CMAKE_ARGS='-D CMAKE_CXX_STANDARD_LIBRARIES="-lm -lc"',
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert library_names(names) == LIBRARIES
    lines = log.read_text().splitlines()
    for source in ("extension.cpp", "level.cpp", "matrix_unit.cpp", "layer_norm_2d_kernel.cpp", "build_info.cpp"):
        compiled = [line for line in lines if line.endswith(f"/{source}")]
        assert compiled and all(line.split()[0] == GCC for line in compiled)
        assert all("-DIPT_FAST_OPTION" in line and "-DIPT_FAST_FLAG" in line for line in compiled)
    (cache,) = small.glob("build/cmake-*/CMakeCache.txt")
    assert "CMAKE_GENERATOR:INTERNAL=Unix Makefiles" in cache.read_text()
    assert "CMAKE_CXX_STANDARD_LIBRARIES:UNINITIALIZED=-lm -lc" in cache.read_text()
    assert (cache.parent / "Makefile").exists() and not (cache.parent / "build.ninja").exists()


def test_a_module_that_cannot_be_loaded_fails_the_build(small, tmp_path):
    """With the loader's message. A library that has to be loaded first can be named. CMake's launcher is heeded."""
    launcher, log = write_launcher(tmp_path)
    source = small / "csrc/cpu/extension.cpp"
    text = source.read_text()
    source.write_text(text + 'extern "C" void ipt_fast_elsewhere();\nvoid (*volatile call)() = ipt_fast_elsewhere;\n')
    process, names = build_wheel(small, CMAKE_BUILD_TYPE="None", CMAKE_CXX_COMPILER_LAUNCHER=launcher)
    assert any(line.endswith("/extension.cpp") for line in log.read_text().splitlines())
    assert process.returncode != 0 and names is None
    said = process.stdout + process.stderr
    assert "the modules were built but cannot be loaded" in said and "undefined symbol: ipt_fast_elsewhere" in said
    library = tmp_path / "elsewhere.so"
    (tmp_path / "elsewhere.c").write_text("void ipt_fast_elsewhere() {}\n")
    succeed(GCC, "-x", "c", "-shared", "-fPIC", str(tmp_path / "elsewhere.c"), "-o", str(library))
    process, names = build_wheel(
        small, CMAKE_BUILD_TYPE="None", CMAKE_CXX_COMPILER_LAUNCHER=launcher, IPT_FAST_PRELOAD=str(library)
    )
    source.write_text(text)
    assert process.returncode == 0 and library_names(names) == LIBRARIES


def refusal(checkout, **environment):
    """The one line that a build ends with that configures and compiles nothing."""
    before = set(checkout.glob("build/cmake-*"))
    process = run(sys.executable, "setup.py", "build_ext", cwd=checkout, **(UNSET | environment))
    assert process.returncode != 0 and set(checkout.glob("build/cmake-*")) == before
    (line,) = process.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("front", "said"),
    [(OTHER_RUNTIME, "undefined symbol: __kmpc_fork_call"), (NO_HEADER, "'omp.h' file not found")],
    ids=["other_runtime", "no_header"],
)
def test_a_compiler_of_another_openmp_is_refused(small, tmp_path, front, said):
    compiler = write_compiler(tmp_path, front)
    sentence = refusal(small, CXX=compiler)
    assert sentence.startswith(f"ipt-fast: {compiler} compiles no OpenMP module that works beside this torch")
    assert said in sentence and sentence.endswith("use g++, or set IPT_FAST_PURE=1 to install plain PyTorch")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
@pytest.mark.parametrize("chosen", [{"CXX": "clang++"}, {"CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=clang++"}])
def test_clang_is_refused(small, chosen):
    """torch's OpenMP is gcc's. Where it is LLVM's, clang's modules load, and this test is for nothing."""
    assert refusal(small, **chosen).startswith("ipt-fast: clang++ compiles no OpenMP module")


def find_compiler(checkout, **environment):
    """What setup.py says of the compilers."""
    script = """
import runpy, sys
sys.argv = ["setup.py", "--version"]
print(runpy.run_path("setup.py")["find_compiler"]())
"""
    process = run(sys.executable, "-c", script, cwd=checkout, **(UNSET | environment))
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1]


def test_an_unfit_compiler_that_nobody_chose_is_passed_over(small, tmp_path):
    write_compiler(tmp_path, OTHER_RUNTIME, "c++")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert f"program='{shutil.which('g++')}'" in find_compiler(small, PATH=path)
    assert f"launcher=[], program='{tmp_path}/c++'" in find_compiler(small, CXX=write_compiler(tmp_path, "", "c++"))
