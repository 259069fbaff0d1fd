"""Loads the compiled libraries once. Importing this module never fails: what went wrong is kept for `error`."""

import functools
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
# Written by a build that compiled nothing: one line that says why.
WHY_PURE = PACKAGE / "_why_pure.txt"
_ON_DEMAND = "IPT_FAST_PURE is set"
OLDEST_TRITON = (3, 5)

Fake = Callable[..., torch.Tensor]
_declared: dict[str, list[tuple[str, Fake | None]]] = {"ipt_fast_cpu": [], "ipt_fast_cuda": []}
_defined: dict[str, torch.library.Library] = {}
_defining = threading.Lock()


def declare(library: str, schema: str, fake: Fake | None = None) -> None:
    """An operator that a compiled library implements, defined as soon as that is loaded.

    With a ``fake``, which tells the output's shape, compilers trace it, and autograd lets it pass without a gradient.

    A library whose functions do not take what the schemas say, such as one of an older version, is then an error like
    all others. Were the operators defined first, loading it would end the process.
    """
    with _defining:
        _declared[library].append((schema, fake))
        if library in _defined:
            _define_one(_defined[library], schema, fake)


def _define_one(library: torch.library.Library, schema: str, fake: Fake | None) -> None:
    library.define(schema)
    if fake is not None:
        name = schema.partition("(")[0]
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def _define(library: str) -> None:
    """The operators of a library that is loaded. Raises RuntimeError where one does not fit."""
    with _defining:
        if library not in _defined:
            operators = torch.library.Library(library, "FRAGMENT")
            for schema, fake in _declared[library]:
                _define_one(operators, schema, fake)
            _defined[library] = operators


def _misfit(exception: RuntimeError) -> str:
    said = " ".join(str(exception).split())
    return f"are not those of this version, reinstall ipt-fast with `pip install --no-build-isolation .`: {said}"


def load() -> bool:
    """Load the library if that has not happened yet. True if its operators (`torch.ops.ipt_fast_cpu`) are there."""
    return error() is None


@functools.cache
def error() -> str | None:
    """None if the library is loaded, else one sentence with the original error's text."""
    found = importlib.util.find_spec("ipt_fast._C")
    if found is None:
        return _why_absent()
    if foreign := _of_another_copy(found, PACKAGE):
        return f"the compiled extension found is that of another copy of ipt_fast: {foreign}"
    try:
        built_for = build_info().get("torch", "an unknown version")
        # The C++ interface of torch is only kept within a minor version.
        if _minor_version(built_for) != _minor_version(torch.__version__):
            return (
                f"the compiled extension was built for torch {built_for}, this is torch {torch.__version__}: "
                "reinstall ipt-fast with `pip install --no-build-isolation .`"
            )
        importlib.import_module("ipt_fast._C")
        _define("ipt_fast_cpu")
    except (ImportError, OSError) as exception:
        return f"the compiled extension cannot be loaded: {exception}"
    except RuntimeError as exception:
        return f"the compiled extension's functions {_misfit(exception)}"
    return None


def _of_another_copy(found: importlib.machinery.ModuleSpec, *places: Path) -> str | None:
    """Where a module of ours lies, if not in this copy of the package: editable installs serve any folder."""
    if found.origin is None or any(Path(found.origin).resolve().parent == place.resolve() for place in places):
        return None
    return f"{found.origin}, while python imports ipt_fast from {PACKAGE}; start python in another folder"


def _why_absent() -> str:
    if elsewhere := _hidden_installation():
        return (
            f"python imports ipt_fast from {PACKAGE}, a source tree without compiled kernels, which hides the "
            f"installation in {elsewhere}: start python in another folder"
        )
    why = WHY_PURE.read_text().strip() if WHY_PURE.is_file() else "it was not built, or not for this Python"
    return (
        f"the compiled extension is not part of this installation: {why} "
        "(`pip install -v --no-build-isolation .` in a clone builds it)"
    )


def _hidden_installation() -> Path | None:
    """The first other ipt_fast on Python's path that has compiled kernels."""
    packages = (Path(entry or ".").resolve() / "ipt_fast" for entry in sys.path)
    return next((p for p in packages if p != PACKAGE.resolve() and any(p.glob("_C.*.so"))), None)


def reason_for_plain(device: str) -> str | None:
    """Why no compiled kernel runs for tensors on ``device``, "cpu" or "cuda"; None if some do, or if so wished."""
    reason = error() if device == "cpu" else _reason_for_plain_gpu() if device == "cuda" else None
    if reason is None or os.environ.get("IPT_FAST_PURE", "0") not in ("", "0"):
        return None
    return None if WHY_PURE.is_file() and WHY_PURE.read_text().strip() == _ON_DEMAND else reason


@functools.cache
def _reason_for_plain_gpu() -> str | None:
    return cuda_error() and triton_error()


@functools.cache
def triton_error() -> str | None:
    """None if Triton and the kernels written in it can be imported, else one sentence with the error's text."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install ipt-fast[triton])"
    found = importlib.util.find_spec("ipt_fast.kernels")
    if found is None:
        elsewhere = _hidden_installation()
        return f"Triton's kernels are not in {PACKAGE}" + (f", which hides {elsewhere}" if elsewhere else "")
    if foreign := _of_another_copy(found, PACKAGE / "kernels", PACKAGE.parent / "kernels"):
        return f"Triton's kernels found are those of another copy of ipt_fast: {foreign}"
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
            return f"the kernels need Triton {'.'.join(map(str, OLDEST_TRITON))} or later; this is {version}"
        importlib.import_module("ipt_fast.kernels")
    except Exception as exception:  # whatever it says is the reason
        return f"Triton's kernels cannot be imported: {type(exception).__name__}: {exception}"
    return None


@functools.cache
def cuda_error() -> str | None:
    """None if the CUDA library is loaded (`torch.ops.ipt_fast_cuda`), else one sentence with the original error's text.

    IPT_FAST_EMULATED_CUDA in the environment names a library with the same kernels for emulated GPUs, which takes its
    place (tests/cuda/emulated.py builds it).
    """
    try:
        if emulated := os.environ.get("IPT_FAST_EMULATED_CUDA"):
            torch.ops.load_library(emulated)
        elif (found := importlib.util.find_spec("ipt_fast._C_cuda")) is None:
            return (
                "the CUDA kernels are not part of this installation (FORCE_CUDA=1 pip install --no-build-isolation .)"
            )
        elif foreign := _of_another_copy(found, PACKAGE):
            return f"the CUDA kernels found are those of another copy of ipt_fast: {foreign}"
        else:
            importlib.import_module("ipt_fast._C_cuda")
        _define("ipt_fast_cuda")
    except (ImportError, OSError) as exception:
        return f"the CUDA kernels cannot be loaded: {exception.__cause__ or exception}"
    except RuntimeError as exception:
        return f"the CUDA library's functions {_misfit(exception)}"
    return None


def build_info() -> dict:
    """Compiler, flags, C++ standard, torch version, instruction sets and CUDA architectures; empty if not built."""
    if importlib.util.find_spec("ipt_fast._build_info") is None:
        return {}
    return importlib.import_module("ipt_fast._build_info").build_info()


def isa() -> str | None:
    """The level of instruction sets the CPU's kernels use now, such as "generic"; None if the library is not loaded.

    The processor decides; the environment variable IPT_FAST_CPU_ISA caps it. csrc/cpu/levels.cmake lists the levels.
    """
    return torch.ops.ipt_fast_cpu.isa() if load() else None


def _minor_version(version: str) -> list[str]:
    return version.split(".")[:2]
