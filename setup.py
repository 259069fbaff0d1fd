"""Builds the compiled modules through CMake and Ninja. What is installed and how is in pyproject.toml.

IPT_FAST_BUILD says which: "cpu", "cuda" or "cpu,cuda". Unless it is set, the CPU's kernels are built, and CUDA's where
FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST is set, or a GPU is there and nvcc is.

The install never needs a compiler: where the modules cannot be built, or IPT_FAST_PURE=1 asks for it, ipt_fast is
installed as plain PyTorch. A compile error with a working compiler does fail the build.
"""

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

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULES = {"cpu": "ipt_fast._C", "cuda": "ipt_fast._C_cuda"}
CUDA_SHARED_MEMORY = 163 << 10  # bytes a block, as in ipt_fast/ops/_cuda.py
CUDA_ARCHITECTURES = "8.0+PTX 9.0a"  # unless TORCH_CUDA_ARCH_LIST is set
BUILD_COMMANDS = {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}
GIB_PER_JOB = 2

NO_TORCH = """
ipt-fast compiles against the torch it will run with, and there is no torch in this build environment
(pip's default is an isolated one). Install torch, then run

    pip install --no-build-isolation .

or set IPT_FAST_PURE=1 to install plain PyTorch without the compiled kernels.
"""

TRIAL = "#include <Python.h>\n#include <concepts>\nint main() { return 0; }\n"


def say(message: str) -> None:
    print(f"ipt-fast: {message}", file=sys.stderr, flush=True)


def find_tool(name: str) -> str | None:
    """The program of this Python environment, which need not be on PATH, or else the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def compilers() -> list[str]:
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]


def find_compiler() -> tuple[str | None, str]:
    """The first compiler that compiles a small C++20 Python module, or None with what the last one said."""
    said = f"no C++ compiler found (tried {', '.join(compilers())})"
    for command in compilers():
        program, *arguments = shlex.split(command)
        if shutil.which(program) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.cpp")
            source.write_text(TRIAL)
            includes = ["-I", sysconfig.get_path("include")]
            trial = [program, *arguments, "-std=c++20", *includes, "-c", str(source), "-o", f"{folder}/trial.o"]
            result = subprocess.run(trial, capture_output=True, text=True)
        if result.returncode == 0:
            return command, ""
        said = f"{command} cannot compile a C++20 Python module: {result.stderr.strip()}"
    return None, said


def reason_for_pure() -> str | None:
    """None where the compiled modules can be built, else why not."""
    if os.environ.get("IPT_FAST_PURE", "0") not in ("", "0"):
        return "IPT_FAST_PURE is set"
    if not sys.platform.startswith("linux"):
        return f"the compiled kernels are for Linux, this is {sys.platform}"
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"{tool} not found (pip install cmake ninja)"
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
        result = subprocess.run(trial, capture_output=True, text=True)
    return None if result.returncode == 0 else f"{trial[0]} cannot compile C++20: {result.stderr.strip()}"


def host_compiler() -> str:
    return os.environ.get("CUDAHOSTCXX") or shutil.which(shlex.split(find_compiler()[0])[0])


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
            sys.exit(f"TORCH_CUDA_ARCH_LIST has {entry!r}; entries are such as {CUDA_ARCHITECTURES!r}")
        if float(version.rstrip("af")) < 8.0:
            say(f"TORCH_CUDA_ARCH_LIST has {entry}, which the CUDA kernels are not built for: they need 8.0 or later")
            continue
        number = version.replace(".", "")
        names += [f"{number}-real", *([f"{number}-virtual"] if plus else [])]
    if not names:
        sys.exit(f"TORCH_CUDA_ARCH_LIST names no chip of 8.0 or later, such as {CUDA_ARCHITECTURES!r}")
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

        program, *arguments = shlex.split(find_compiler()[0])
        torch_dir = Path(torch.__file__).parent
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_CXX_COMPILER": shutil.which(program),
            "CMAKE_CXX_FLAGS": shlex.join(arguments + shlex.split(os.environ.get("CXXFLAGS", ""))),
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYTHON_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "TORCH_DIR": torch_dir,
            "TORCH_VERSION": torch.__version__,
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "IPT_FAST_BUILD": ";".join(parts()),
        }
        if "cuda" in parts():
            options |= cuda_options()
        configure = [find_tool("cmake"), "-S", str(ROOT), "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
        # One folder for each set of options: a stale CMake cache cannot be met, and a rebuild stays incremental.
        build_dir = ROOT / "build" / f"cmake-{hashlib.sha256(repr(configure).encode()).hexdigest()[:12]}"
        subprocess.run([*configure, "-B", str(build_dir)], check=True)
        subprocess.run([find_tool("cmake"), "--build", str(build_dir), "--parallel", str(job_count())], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build_dir / target.name, target)


def extensions() -> list[Extension]:
    """Nothing is decided, and nothing refused, for commands that build nothing (sdist, egg_info, --version)."""
    if not BUILD_COMMANDS & set(sys.argv):
        return []
    reason = reason_for_pure()
    if reason is not None:
        say(f"INSTALLING PLAIN PYTORCH, WITHOUT THE COMPILED KERNELS: {reason}")
        return []
    if importlib.util.find_spec("torch") is None:
        sys.exit(NO_TORCH)
    return [Extension(name, sources=[]) for name in (*(MODULES[part] for part in parts()), "ipt_fast._build_info")]


setup(
    packages=[*find_packages(include=["ipt_fast*"]), "ipt_fast.kernels"],
    package_dir={"ipt_fast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
