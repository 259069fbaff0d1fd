"""Files from which training resumes; a crash while saving leaves the previous ones whole.

Where every process has all weights, the first one writes the file ``checkpoint.pth``. Where they are sharded (FSDP2)
all processes write into the folder ``checkpoint-<iteration>``, in the format of torch.distributed.checkpoint.
"""

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from .._files import atomic_write, naming
from ..models.checkpoint import check_archive
from .distributed import World

FILE = "checkpoint.pth"
_FORMAT = "ipt_fast.training.1"
_VALUES = "run.pth"  # in a folder: what is no sharded tensor


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, containers of tensors and plain values so that ``torch.load(weights_only=True)`` reads them.

    Raises:
        OSError: the file cannot be written, such as for want of space; the previous one is left.
    """
    # Into an open file: where torch.save opens it, a full disk is an internal error of its archive alone.
    with naming(path), atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": _FORMAT, **state}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that ``save_checkpoint`` wrote, on the CPU; of a folder all but the tensors.

    Raises:
        ValueError: the file is missing, damaged or no training checkpoint.
    """
    if path.is_dir():
        path /= _VALUES
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file of a training run to resume; got {path}, which is not there")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, depending on where the damage lies
        raise ValueError(
            f"checkpoint must be a readable file of a training run; got {path} ({_reason(error)})"
        ) from error
    if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
        raise ValueError(f"checkpoint must be a file of a training run of format {_FORMAT}; got {path}, which is not")
    return state


def find_checkpoint(out: Path) -> Path:
    """The newest checkpoint of the run in ``out``: a file or a folder; ``checkpoint.pth`` where there is none."""
    folders = _folders(out)
    if not folders or not (out / FILE).exists():
        return folders[-1] if folders else out / FILE
    # Both are left where a run was killed just after it saved in another form than before.
    return max(out / FILE, folders[-1], key=lambda path: load_checkpoint(path)["iteration"])


def save_sharded(out: Path, tensors: dict[str, Tensor], values: dict[str, Any], world: World) -> Path:
    """Write the folder ``checkpoint-<iteration>``; all processes must call this, with their parts of the tensors.

    Args:
        tensors: by name; sharded ones (DTensor), or the same in all processes.
        values: what :func:`save_checkpoint` takes, with the number of the "iteration".

    Raises:
        OSError: a file cannot be written; the previous checkpoint is left.
    """
    folder = out / f"checkpoint-{values['iteration']:08}"
    temporary = folder.with_name(f".{folder.name}")

    def prepare() -> None:
        if world.rank == 0:
            with naming(folder):
                shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
                temporary.mkdir()

    def finish() -> None:
        if world.rank == 0:
            save_checkpoint(temporary / _VALUES, values)
            with naming(folder):
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)

    world.together(prepare)
    try:
        with _one_process_is_enough():
            dcp.save(tensors, checkpoint_id=temporary, no_dist=world.size == 1)
    except dcp.CheckpointException as error:  # in all processes
        raise OSError(f"cannot write {folder}: {_reason(error)}") from error
    world.together(finish)
    return folder


def stored_names(folder: Path) -> list[str]:
    """The names of the tensors in a sharded checkpoint."""
    with _readable(folder):
        return list(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def load_sharded(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill tensors, whole or sharded over any number of processes, with those of the same names in a checkpoint.

    Raises:
        ValueError: one is missing or has another shape, or a file is damaged.
    """
    with _readable(folder), _one_process_is_enough():
        dcp.load(tensors, checkpoint_id=folder, no_dist=world.size == 1)


def remove_others(out: Path, kept: Path) -> None:
    """Remove the run's checkpoints but the newest, and what saves that were killed left of theirs."""
    for path in (*_folders(out), *_folders(out, ".checkpoint-")):
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
    if kept != out / FILE:
        (out / FILE).unlink(missing_ok=True)


def _folders(out: Path, prefix: str = "checkpoint-") -> list[Path]:
    found = [path for path in out.glob(f"{prefix}*") if re.fullmatch(r"\d{8,}", path.name[len(prefix) :])]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[len(prefix) :]))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # many kinds, depending on where the damage lies
        raise ValueError(
            f"checkpoint must be a readable folder of a training run; got {folder} ({_reason(error)})"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, in the first process that tells."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _one_process_is_enough() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
