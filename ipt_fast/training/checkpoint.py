"""The file from which training resumes, replaced atomically: a crash while saving leaves the previous one whole."""

from pathlib import Path
from typing import Any

import torch

from .._files import atomic_write, naming
from ..models.checkpoint import check_archive

_FORMAT = "ipt_fast.training.1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, containers of tensors and plain values so that ``torch.load(weights_only=True)`` reads them.

    Raises:
        OSError: the file cannot be written, such as for want of space; the previous one is left.
    """
    # Into an open file: where torch.save opens it, a full disk is an internal error of its archive alone.
    with naming(path), atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": _FORMAT, **state}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that ``save_checkpoint`` wrote, on the CPU.

    Raises:
        ValueError: the file is missing, damaged or no training checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file of a training run to resume; got {path}, which is not there")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, depending on where the damage lies
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"checkpoint must be a readable file of a training run; got {path} ({reason})") from error
    if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
        raise ValueError(f"checkpoint must be a file of a training run of format {_FORMAT}; got {path}, which is not")
    return state
