"""By which training data are recognised."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import Entry


def fingerprint(entries: Iterable[Entry], root: Path) -> dict[str, Any]:
    """How many images there are, and a digest of their names, places and sizes.

    Args:
        entries: images in the order in which they are drawn.
        root: folder that the names are relative to, so that data may move.

    Raises:
        ValueError: a file is not there any more.
    """
    digest, images = hashlib.sha256(), 0
    for path, offset, size in entries:
        try:
            size = path.stat().st_size if size < 0 else size
        except OSError as error:
            raise ValueError(f"data must hold files that can be read; got {path}: {error.strerror}") from error
        digest.update(f"{path.relative_to(root).as_posix()}\0{offset}\0{size}\n".encode("utf-8", "surrogateescape"))
        images += 1
    return {"images": images, "digest": digest.hexdigest()}
