"""Writing files so that a reader never sees half of one."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path in the folder of ``path`` (same suffix) that replaces ``path`` when the block succeeds.

    When the block raises, the temporary file is removed and whatever stood at ``path`` before is left as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
