"""Published implementations, where the test-only packages that hold them are installed.

    pip install --no-deps torchvision==0.28.0 spandrel spandrel_extra_arches timm einops

They import torchvision, whose compiled library cannot be loaded beside a CPU-only torch; its import then stops at two
operators that nobody here calls. Their schemas are declared instead, which is all that the import needs.
"""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

_declared = []  # keeps the library, and so the schemas, alive


def _declare_torchvision_operators():
    found = importlib.util.find_spec("torchvision")
    if _declared or found is None:
        return
    try:
        torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def public_module(name):
    """The module of that name; the calling test is skipped where its package, or one it needs, is not installed."""
    _declare_torchvision_operators()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs the package {error.name!r}, which is not installed")
