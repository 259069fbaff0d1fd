"""Putting results where they belong, and knowing those that are there."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._files import atomic_write, is_stream
from ._jobs import Job
from ._journal import Journal, digest_of_file


class Results:
    """The results of a run.

    Args:
        journal: of a folder of results; a file that is the result of one image has none.
        made_with: the model and the options, as the journal has them.
    """

    def __init__(self, journal: Journal | None, made_with: dict[str, Any]) -> None:
        self._journal, self._made_with = journal, made_with

    def found(self, job: Job) -> str:
        """What stands where the results go: "" if it is they, "nothing" if one is missing, else what is wrong."""
        try:
            return self._found(job)
        except OSError as error:
            return str(error)

    def _found(self, job: Job) -> str:
        found = ""
        for path in job.results:
            if is_stream(path) or not path.exists():
                found = "nothing"
            elif path.is_dir():
                return f"{path} is a folder"
            elif self._journal is None:
                return f"{path} exists; --overwrite replaces it"
            elif not self._journal.holds(path, job.made_from(path, self._made_with)):
                return (
                    f"{path} exists, and is not known to be made of this image by this model with these options; "
                    "--overwrite replaces it"
                )
        return found

    @contextlib.contextmanager
    def write(self, result: Path, made_from: dict[str, Any]) -> Iterator[Path]:
        """Yield a temporary path whose content is recorded, and becomes ``result`` when the block succeeds."""
        with atomic_write(result) as path:
            yield path
            if self._journal is not None and not is_stream(result):
                self._record(result, digest_of_file(path), made_from)

    def place(self, result: Path, content: Path, sha256: str, made_from: dict[str, Any]) -> None:
        """Move a file that is whole, and has this checksum, to where it belongs, and record it."""
        with atomic_write(result) as path:
            shutil.move(content, path)
            if self._journal is not None and not is_stream(result):
                self._record(result, sha256, made_from)

    def _record(self, result: Path, sha256: str, made_from: dict[str, Any]) -> None:
        assert self._journal is not None
        try:
            self._journal.add(result, sha256, made_from)
        except OSError as error:
            warnings.warn(
                f"it is restored, but a later run will not know: no record could be kept: {error}", stacklevel=2
            )
