"""What a command may write, one rule for all of them: nothing is overwritten that the command did not make.

Links are followed, and devices and FIFOs are written to: :func:`ipt_fast._files.atomic_write` does both.
"""

import os
import tempfile
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from .._files import is_stream


class Outputs:
    """The files that a command will write, checked before the work.

    Args:
        reads: all files that the command reads; none of them may be written, by whatever name.
    """

    def __init__(self, reads: Iterable[Path]):
        self._reads = {_identity(path) for path in reads}
        self._claimed: dict[Hashable, str] = {}

    def claim(self, name: str, path: Path, made_by_us: Callable[[Path], bool] | None = None, *, of: str = "") -> None:
        """Raise ValueError unless ``path`` may be written.

        Args:
            name: of the argument that says the path.
            made_by_us: whether an existing file is an earlier output of the same command. Without it an existing file
                passes, for the command to decide later.
            of: what the output is of, for the message about two outputs in one place.
        """
        if is_stream(path):
            return
        identity = _identity(path)
        if identity in self._reads:
            raise ValueError(f"{name} must not overwrite an input; got {path}")
        of = of or name
        if identity in self._claimed:
            raise ValueError(
                f"{name} must have a place for each output; got {path} for both {self._claimed[identity]} and {of}"
            )
        self._claimed[identity] = of
        if made_by_us is None or not os.path.lexists(path):
            return
        if path.is_dir():
            raise ValueError(f"{name} must be a file; got the folder {path}")
        if path.exists() and not made_by_us(path):
            raise ValueError(f"{name} must be a new file, or one that this command made; got {path}")


def check_writable(name: str, path: Path) -> None:
    """Raise ValueError unless a file can be written in the folder of ``path``, which must be there.

    Args:
        name: of the argument that says the path.
    """
    if is_stream(path):
        return
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be in a folder that can be written; got {path} ({error.strerror})") from error


def check_new_folder(name: str, folder: Path) -> None:
    """Raise ValueError unless ``folder`` is empty, or not there yet."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{name} must be a new folder, or an empty one; got {folder}")


def model_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files of a saved model; none where ``source`` is no folder, as no command writes what ships."""
    folder = Path(source)
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _identity(path: Path) -> Hashable:
    """The same for all names of a file: links, other spellings, another case where the file system has none."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino
