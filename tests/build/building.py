"""Copies of the sources, builds of them and empty environments to install them into."""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
SOURCES = [
    *("setup.py", "CMakeLists.txt", "Makefile", "pyproject.toml", "MANIFEST.in", ".clang-format", ".gitignore"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
    *("csrc", "ipt_fast", "kernels", "docs", "tests", "benchmarks"),
]
IGNORED = shutil.ignore_patterns("*.so", "__pycache__", "_why_pure.txt")
# What a build reads from the environment: none of it is taken from whoever runs the tests.
UNSET = dict.fromkeys(
    [
        *("IPT_FAST_PURE", "IPT_FAST_BUILD", "IPT_FAST_PRELOAD", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"),
        *("CXX", "CXXFLAGS", "CMAKE_ARGS", "CMAKE_GENERATOR", "CMAKE_BUILD_TYPE"),
        *("CMAKE_CXX_COMPILER_LAUNCHER", "CMAKE_CUDA_COMPILER_LAUNCHER"),
    ]
)


def run(*command, cwd=None, timeout=500, input=None, text=True, **environment):
    """The finished process; a variable given as None is removed from its environment."""
    merged = {k: v for k, v in (os.environ | environment).items() if v is not None}
    return subprocess.run(command, cwd=cwd, env=merged, input=input, capture_output=True, text=text, timeout=timeout)


def succeed(*command, **options):
    """What a command that must succeed printed."""
    process = run(*command, **options)
    assert process.returncode == 0, (command, process.stdout[-4000:], process.stderr[-4000:])
    return process.stdout + process.stderr


def copy_sources(folder):
    """A copy of the sources without anything built."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=IGNORED)
        elif source.exists():
            shutil.copy(source, folder)
    return folder


def copy_small_sources(folder):
    """The same with two files and one kernel of the C++ for the CPU: it is compiled soon, and computes nothing."""
    copy_sources(folder)
    for source in (folder / "csrc/cpu").glob("*.cpp"):
        if source.name not in ("extension.cpp", "level.cpp", "matrix_unit.cpp", "layer_norm_2d_kernel.cpp"):
            source.unlink()
    return folder


def build_wheel(checkout, **environment):
    """Build without isolation; the process, and the names in the wheel (None if there is none)."""
    wheels = checkout / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    options = ("-v", "--no-build-isolation", "--no-deps", "-w", "wheels")
    process = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=checkout, **(UNSET | environment))
    return process, zipfile.ZipFile(wheel_of(checkout)).namelist() if any(wheels.glob("*.whl")) else None


def wheel_of(checkout):
    (wheel,) = checkout.glob("wheels/*.whl")
    return wheel


def call_backend(checkout, hook, folder, **environment):
    """Call a hook of the build backend, such as build_sdist or build_editable; the process."""
    script = f"import setuptools.build_meta as b; b.{hook}({str(folder)!r})"
    return run(sys.executable, "-c", script, cwd=checkout, **(UNSET | environment))


def metadata(text):
    """The fields of a package's METADATA or PKG-INFO."""
    return email.message_from_string(text)


def wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return metadata(archive.read(name).decode())


def library_names(names):
    return sorted(name for name in names if name.endswith(".so"))


def run_installed(folder, script):
    """What `script` prints where ipt_fast comes from `folder` alone, whatever this environment has installed."""
    hide_editable = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
    process = run(sys.executable, "-c", hide_editable + script, cwd=folder, PYTHONPATH=str(folder))
    assert process.returncode == 0, process.stderr
    assert str(folder) in process.stdout
    return process.stdout


class Environment:
    """A new environment as ``python -m venv`` makes it, with links to this one's torch and what ipt_fast needs."""

    # Not what builds: setuptools, wheel, cmake, ninja.
    HIDDEN = (
        "setuptools",
        "pkg_resources",
        "_distutils_hack",
        "distutils",
        "wheel",
        "cmake",
        "ninja",
        "pip",
        "ipt",
        "__",
    )

    def __init__(self, folder):
        self.folder = folder
        succeed(sys.executable, "-m", "venv", str(folder))
        self.site = pathlib.Path(
            self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        )
        for entry in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.lower().startswith(self.HIDDEN) and entry.suffix != ".pth":
                (self.site / entry.name).symlink_to(entry)

    def run(self, *command, cwd=None, timeout=1500, **environment):
        """A command as if the environment were activated, from outside of every checkout."""
        path = f"{self.folder}/bin{os.pathsep}/usr/local/bin{os.pathsep}/usr/bin{os.pathsep}/bin"
        return run(
            *command,
            cwd=cwd or self.folder,
            timeout=timeout,
            **(UNSET | {"PATH": path, "PYTHONPATH": None} | environment),
        )

    def succeed(self, *command, **options):
        process = self.run(*command, **options)
        assert process.returncode == 0, (command, process.stdout[-4000:], process.stderr[-4000:])
        return process.stdout + process.stderr
