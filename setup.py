"""Builds the compiled modules through CMake. What is installed and how is in pyproject.toml.

IPT_FAST_BUILD says which: "cpu", "cuda" or "cpu,cuda". Unless it is set, the CPU's kernels are built, and CUDA's where
FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST is set, or a GPU is there and nvcc is.

The install needs no compiler: where the modules cannot be built, or IPT_FAST_PURE=1 asks for it, ipt_fast is installed
as plain PyTorch, with the reason in ipt_fast/_why_pure.txt. A compile error with a working compiler, a module that
cannot be loaded, and IPT_FAST_BUILD where it cannot be met do fail the build.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext, get_abi3_suffix
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODULES = {"cpu": "ipt_fast._C", "cuda": "ipt_fast._C_cuda"}
BUILD_INFO = "ipt_fast._build_info"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Of CUDA's module, which any Python from 3.11 on can load, as any torch from 2.10 on can.
STABLE_SUFFIX = get_abi3_suffix() or SUFFIX
DEPENDENCIES = ["numpy", "safetensors", "huggingface-hub", "pillow", "pyyaml", "tqdm"]
CUDA_SHARED_MEMORY = 163 << 10  # bytes a block, as in ipt_fast/ops/_cuda.py
CUDA_ARCHITECTURES = "8.0+PTX 9.0a"  # unless TORCH_CUDA_ARCH_LIST is set
WHEEL_COMMANDS = {"dist_info", "bdist_wheel", "editable_wheel"}
BUILD_COMMANDS = WHEEL_COMMANDS | {"build", "build_ext", "install", "develop"}
GIB_PER_JOB = 2

NO_TORCH = """
ipt-fast compiles against the torch it will run with, and there is no torch in this build environment
(pip's default is an isolated one). Install torch, then run

    pip install --no-build-isolation .

or set IPT_FAST_PURE=1 to install plain PyTorch without the compiled kernels.
"""

NO_WHEEL = """
ipt-fast: setuptools {} cannot make wheels without the package wheel. Run

    pip install setuptools wheel cmake ninja && pip install --no-build-isolation .
"""

# A module as ours are: C++20, Python's headers and, where -fopenmp is given, a parallel region.
TRIAL = """
#include <Python.h>
#include <concepts>
#ifdef _OPENMP
#include <omp.h>
#endif
PyMODINIT_FUNC PyInit_trial() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "trial"};
    long threads = 0;
#pragma omp parallel reduction(+ : threads)
    threads += 1;
    return threads > 0 ? PyModule_Create(&module) : nullptr;
}
"""

# Loads modules, given as names and files, beside the torch that they were built for.
LOAD = """
import importlib.util, sys, torch
for name, file in zip(sys.argv[1::2], sys.argv[2::2]):
    spec = importlib.util.spec_from_file_location(name, file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def say(message: str) -> None:
    print(f"ipt-fast: {message}", file=sys.stderr, flush=True)


def find_tool(name: str) -> str | None:
    """The program of this Python environment, which need not be on PATH, or else the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def cmake_arguments() -> list[str]:
    """CMAKE_ARGS, each option in one word."""
    return shlex.split(re.sub(r"(^|\s)-([DG])\s+", r"\1-\2", os.environ.get("CMAKE_ARGS", "")))


def cmake_variable(name: str) -> str | None:
    """The value that CMAKE_ARGS gives a variable."""
    found = [re.fullmatch(rf"-D{name}(?::\w+)?=(.*)", argument) for argument in cmake_arguments()]
    return next((match[1] for match in reversed(found) if match), None)


def generator() -> str:
    named = [argument[2:] for argument in cmake_arguments() if argument.startswith("-G")]
    return named[-1] if named else os.environ.get("CMAKE_GENERATOR") or "Ninja"


def make_program() -> tuple[str, str | None]:
    """The name of the program that CMake's generator needs, and where it is."""
    name = "ninja" if generator().startswith("Ninja") else "make"
    return name, cmake_variable("CMAKE_MAKE_PROGRAM") or find_tool(name)


class Compiler(NamedTuple):
    launcher: list[str]  # such as ccache, in front of the compiler
    program: str
    options: list[str]

    @property
    def command(self) -> list[str]:
        return [*self.launcher, self.program, *self.options]


def compilers() -> list[str]:
    if chosen := cmake_variable("CMAKE_CXX_COMPILER"):
        return [shlex.quote(chosen)]
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]


def parse_compiler(command: str) -> Compiler | None:
    """The compiler is the last word before the first option; None where it or its launcher is not there."""
    words = shlex.split(command)
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    first, program = (shutil.which(word) for word in (words[0], words[count - 1])) if count else (None, None)
    if first is None or program is None:
        return None
    launcher = [os.path.abspath(first), *words[1 : count - 1]] if count > 1 else []
    return Compiler(launcher, os.path.abspath(program), words[count:])


@functools.cache
def find_compiler() -> tuple[Compiler | None, str]:
    """The first compiler whose C++20 modules can be loaded beside torch, or None with what the last one said.

    One that the user chose is refused, not passed over, where it works but its modules cannot be loaded.
    """
    said = f"no C++ compiler found (tried {', '.join(compilers())})"
    for command in compilers():
        compiler = parse_compiler(command)
        if compiler is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "trial.cpp").write_text(TRIAL)
            options = ["-std=c++20", "-fPIC", "-I", sysconfig.get_path("include")]
            trial = [*compiler.command, *options, f"{folder}/trial.cpp"]
            if error := error_of([*trial, "-c", "-o", f"{folder}/trial.o"]):
                said = f"{command} cannot compile a C++20 Python module: {error}"
                continue
            error = openmp_error(compiler, trial, folder) if importlib.util.find_spec("torch") else None
        if error is None:
            return compiler, ""
        said = f"{command} compiles no OpenMP module that works beside this torch ({error}); use g++"
        if compilers() == [command]:
            sys.exit(f"ipt-fast: {said}, or set IPT_FAST_PURE=1 to install plain PyTorch")
    return None, said


def openmp_error(compiler: Compiler, trial: list[str], folder: str) -> str | None:
    """None if the trial, compiled for OpenMP and linked without as our modules are, finds torch's runtime."""
    libraries = [str(torch_folder() / "lib" / name) for name in ("libtorch_cpu.so", "libc10.so")]
    link = [*compiler.command, "-shared", f"{folder}/trial.o", *libraries, "-o", f"{folder}/trial.so"]
    error = error_of([*trial, "-fopenmp", "-c", "-o", f"{folder}/trial.o"]) or error_of(link)
    return error or load_error({"trial": f"{folder}/trial.so"})


def error_of(command: list[str], **environment: str) -> str | None:
    """None if the command succeeds, else its first error, in one line."""
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines() or [f"{command[0]} ended with {result.returncode}"]
    return next((line for line in lines if re.search(r"error: ", line, re.IGNORECASE)), lines[-1]).strip()


def load_error(modules: dict[str, str]) -> str | None:
    """None if a Python process loads these modules beside torch, else the loader's message.

    IPT_FAST_PRELOAD names libraries that such a process has to load first, as for the sanitizers (`make sanitize`).
    """
    preload = {"LD_PRELOAD": os.environ["IPT_FAST_PRELOAD"]} if os.environ.get("IPT_FAST_PRELOAD") else {}
    return error_of([sys.executable, "-c", LOAD, *(word for pair in modules.items() for word in pair)], **preload)


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def reason_for_pure() -> str | None:
    """None where the compiled modules can be built, else why not."""
    if os.environ.get("IPT_FAST_PURE", "0") not in ("", "0"):
        return "IPT_FAST_PURE is set"
    reason = build_obstacle()
    if reason and (wanted := os.environ.get("IPT_FAST_BUILD")):
        sys.exit(f"ipt-fast: IPT_FAST_BUILD={wanted} asks for compiled kernels, which cannot be built: {reason}")
    return reason


def build_obstacle() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"the compiled kernels are for Linux, this is {sys.platform}"
    for tool, path in (("cmake", find_tool("cmake")), make_program()):
        if path is None:
            return f"{tool} not found" + ("" if tool == "make" else " (pip install cmake ninja)")
    compiler, said = find_compiler()
    return None if compiler else said


def parts() -> list[str]:
    """The parts to build: "cpu", "cuda"."""
    if os.environ.get("IPT_FAST_BUILD"):
        wanted = os.environ["IPT_FAST_BUILD"].replace(" ", "").split(",")
        if unknown := set(wanted) - set(MODULES):
            sys.exit(f"IPT_FAST_BUILD must be cpu, cuda or cpu,cuda; got {', '.join(sorted(unknown))}")
        return wanted
    return ["cpu", "cuda"] if cuda_wanted() else ["cpu"]


def cuda_wanted() -> bool:
    import torch

    if os.environ.get("FORCE_CUDA", "0") not in ("", "0") or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return True
    if not torch.cuda.is_available() or find_nvcc() is None:
        return False
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if all(gpu.major < 8 or gpu.shared_memory_per_block_optin < CUDA_SHARED_MEMORY for gpu in gpus):
        say(f"no CUDA kernels: {gpus[0].name} lacks the shared memory that they need; Triton's run there")
        return False
    if reason := nvcc_error():
        say(f"no CUDA kernels: {reason}")
        return False
    return True


def nvcc_error() -> str | None:
    """None if nvcc and the C++ compiler together compile C++20, else what they said."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text("#include <concepts>\n__global__ void kernel() {}\n")
        trial = [find_nvcc(), "-std=c++20", "-ccbin", host_compiler(), "-c", str(source), "-o", f"{folder}/trial.o"]
        error = error_of(trial)
    return None if error is None else f"{trial[0]} cannot compile C++20: {error}"


def host_compiler() -> str:
    return os.environ.get("CUDAHOSTCXX") or find_compiler()[0].program


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_options() -> dict[str, str]:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("the CUDA kernels were asked for, but there is no nvcc on PATH, in CUDACXX or in CUDA_HOME/bin")
    names = []
    for entry in (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES).replace(";", " ").split():
        version, plus, _ = entry.partition("+PTX")
        if not re.fullmatch(r"\d+\.\d[af]?", version):
            sys.exit(f"TORCH_CUDA_ARCH_LIST must have entries such as {CUDA_ARCHITECTURES}; got {entry!r}")
        if float(version.rstrip("af")) < 8.0:
            say(f"TORCH_CUDA_ARCH_LIST has {entry}, which the CUDA kernels are not built for: they need 8.0 or later")
            continue
        number = version.replace(".", "")
        names += [f"{number}-real", *([f"{number}-virtual"] if plus else [])]
    if not names:
        given = os.environ["TORCH_CUDA_ARCH_LIST"]
        sys.exit(f"TORCH_CUDA_ARCH_LIST must name a chip of 8.0 or later, such as {CUDA_ARCHITECTURES}; got {given!r}")
    return {
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_HOST_COMPILER": host_compiler(),
        "CMAKE_CUDA_ARCHITECTURES": ";".join(names),
        "CMAKE_CUDA_FLAGS": os.environ.get("CUDAFLAGS", ""),
    }


def job_count() -> int:
    """MAX_JOBS, or as many jobs as processors and available memory allow."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available_gib = int(meminfo["MemAvailable"].split()[0]) / 2**20
    return max(1, min(len(os.sched_getaffinity(0)), int(available_gib // GIB_PER_JOB)))


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        import torch

        compiler, _ = find_compiler()
        launcher = cmake_variable("CMAKE_CXX_COMPILER_LAUNCHER") or os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER")
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_MAKE_PROGRAM": make_program()[1],
            "CMAKE_CXX_COMPILER": compiler.program,
            "CMAKE_CXX_COMPILER_LAUNCHER": ";".join(compiler.launcher) or launcher or "",
            "CMAKE_CXX_FLAGS": shlex.join(compiler.options + shlex.split(os.environ.get("CXXFLAGS", ""))),
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYTHON_MODULE_SUFFIX": SUFFIX,
            "PYTHON_STABLE_SUFFIX": STABLE_SUFFIX,
            "TORCH_DIR": torch_folder(),
            "TORCH_VERSION": torch.__version__,
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "IPT_FAST_BUILD": ";".join(parts()),
        }
        if "cuda" in parts():
            launcher = os.environ.get("CMAKE_CUDA_COMPILER_LAUNCHER") or ";".join(compiler.launcher)
            options |= cuda_options() | {"CMAKE_CUDA_COMPILER_LAUNCHER": launcher}
        configure = [
            find_tool("cmake"),
            "-S",
            str(ROOT),
            "-G",
            generator(),
            *(f"-D{k}={v}" for k, v in options.items()),
        ]
        configure += [argument for argument in cmake_arguments() if not argument.startswith("-G")]
        # One folder for each set of options: a stale CMake cache cannot be met, and a rebuild stays incremental.
        build_dir = ROOT / "build" / f"cmake-{hashlib.sha256(repr(configure).encode()).hexdigest()[:12]}"
        build = [find_tool("cmake"), "--build", str(build_dir), "--config", options["CMAKE_BUILD_TYPE"]]
        subprocess.run([*configure, "-B", str(build_dir)], check=True)
        subprocess.run([*build, "--parallel", str(job_count())], check=True)
        files = {module.name: Path(self.get_ext_fullpath(module.name)) for module in self.extensions}
        if error := load_error({name: str(build_dir / file.name) for name, file in files.items()}):
            sys.exit(f"ipt-fast: the modules were built but cannot be loaded: {error}")
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build_dir / file.name, file)
            note_reason(file.parent)


class BuildPython(build_py):
    """Nothing of an earlier build is packaged or left in place."""

    def run(self) -> None:
        package = ROOT / "ipt_fast" if self.editable_mode else Path(self.build_lib, "ipt_fast")
        if self.editable_mode:
            made = {extension.name: suffix_of(extension) for extension in self.distribution.ext_modules}
            for name in (*MODULES.values(), BUILD_INFO):
                for suffix in {SUFFIX, STABLE_SUFFIX} - {made.get(name)}:
                    (package / (name.rpartition(".")[2] + suffix)).unlink(missing_ok=True)
        elif package.resolve() != ROOT / "ipt_fast" and not self.distribution.have_run.get("build_ext"):
            for folder in (package, Path(self.get_finalized_command("bdist").bdist_base, "wheel")):
                shutil.rmtree(folder, ignore_errors=True)
        super().run()
        note_reason(package)


def suffix_of(module: Extension) -> str:
    return STABLE_SUFFIX if module.py_limited_api else SUFFIX


def note_reason(package: Path) -> None:
    """One line in the package that says why there are no compiled modules, and no such file where there are."""
    if WHY_PURE is None:
        (package / "_why_pure.txt").unlink(missing_ok=True)
    else:
        (package / "_why_pure.txt").write_text(" ".join(WHY_PURE.split()) + "\n")


def decide() -> tuple[list[str], str | None]:
    """The compiled modules to build, and why there are none; nothing is decided, and nothing refused, for commands that
    build nothing (sdist, egg_info, --version)."""
    if not BUILD_COMMANDS & set(sys.argv):
        return [], None
    # Later ones have bdist_wheel themselves.
    old = tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1)
    if old and WHEEL_COMMANDS & set(sys.argv) and importlib.util.find_spec("wheel") is None:
        sys.exit(NO_WHEEL.format(setuptools.__version__))
    reason = reason_for_pure()
    if reason is not None:
        say(f"INSTALLING PLAIN PYTORCH, WITHOUT THE COMPILED KERNELS: {reason}")
        return [], reason
    if importlib.util.find_spec("torch") is None:
        sys.exit(NO_TORCH)
    return [*(MODULES[part] for part in parts()), BUILD_INFO], None


def torch_requirement() -> str:
    """The C++ interface that the CPU's kernels use is kept within a minor version of torch."""
    if MODULES["cpu"] not in BUILT:
        return "torch>=2.10"
    import torch

    return f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"


BUILT, WHY_PURE = decide()
# Before version 77 setuptools knew no license expressions, neither here nor in pyproject.toml.
LICENSE = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"

setup(
    packages=[*find_packages(include=["ipt_fast*"]), "ipt_fast.kernels"],
    package_dir={"ipt_fast.kernels": "kernels"},
    install_requires=[torch_requirement(), *DEPENDENCIES],
    ext_modules=[Extension(name, sources=[], py_limited_api=name == MODULES["cuda"]) for name in BUILT],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    **{LICENSE: "Apache-2.0"},
)
