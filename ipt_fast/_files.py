"""Writing files so that a reader never sees half of one."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator

_NAME_BYTES = 255  # of file systems that do not say


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path in the folder of ``path`` (same suffix) that replaces ``path`` when the block succeeds.

    When the block raises, the temporary file is removed and whatever stood at ``path`` before is left as it was. The
    temporary name is short, so that ``path`` may have the longest name that the file system allows.
    """
    path = pathlib.Path(path)
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    temporary = path.with_name(f".{secrets.token_hex(8)}{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where the file system cannot hold a name as long as that of ``path``, which need not exist."""
    path = pathlib.Path(path)
    folder = next((parent for parent in path.absolute().parents if os.path.isdir(parent)), None)
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX") if folder else _NAME_BYTES
    except (OSError, ValueError, AttributeError):
        longest = _NAME_BYTES
    if len(os.fsencode(path.name)) > longest:
        raise ValueError(f"path must have a name of at most {longest} bytes; got {path}")
