"""Loads the compiled libraries once. Importing this module never fails: what went wrong is kept for `error`."""

import functools
import importlib.util
import os

import torch

_NOT_BUILT = (
    "the compiled extension is not part of this installation: it was installed with IPT_FAST_PURE=1 or where it could "
    "not be built (`pip install -v --no-build-isolation .` shows why)"
)


def load() -> bool:
    """Load the library if that has not happened yet. True if its operators (`torch.ops.ipt_fast_cpu`) are there."""
    return error() is None


@functools.cache
def error() -> str | None:
    """None if the library is loaded, else one sentence with the original error's text."""
    if importlib.util.find_spec("ipt_fast._C") is None:
        return _NOT_BUILT
    try:
        built_for = build_info()["torch"]
        # The C++ interface of torch is only kept within a minor version.
        if _minor_version(built_for) != _minor_version(torch.__version__):
            return (
                f"the compiled extension was built for torch {built_for}, this is torch {torch.__version__}: "
                "reinstall ipt-fast with `pip install --no-build-isolation .`"
            )
        importlib.import_module("ipt_fast._C")
    except (ImportError, OSError) as exception:
        return f"the compiled extension cannot be loaded: {exception}"
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
        elif importlib.util.find_spec("ipt_fast._C_cuda") is None:
            return (
                "the CUDA kernels are not part of this installation (FORCE_CUDA=1 pip install --no-build-isolation .)"
            )
        else:
            importlib.import_module("ipt_fast._C_cuda")
    except (ImportError, OSError) as exception:
        return f"the CUDA kernels cannot be loaded: {exception.__cause__ or exception}"
    return None


def build_info() -> dict:
    """Compiler, flags, C++ standard, torch version, instruction sets and CUDA architectures; empty if not built."""
    if importlib.util.find_spec("ipt_fast._build_info") is None:
        return {}
    return importlib.import_module("ipt_fast._build_info").build_info()


def isa() -> str | None:
    """The CPU instruction set the kernels use now ("generic", "avx2" or "avx512"), None if the library is not loaded.

    The processor decides; the environment variable IPT_FAST_CPU_ISA caps it.
    """
    return torch.ops.ipt_fast_cpu.isa() if load() else None


def _minor_version(version: str) -> list[str]:
    return version.split(".")[:2]
