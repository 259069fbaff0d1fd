"""Standard output and standard error that never fail: what a command prints does not decide whether it succeeds."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Stream:
    """A text stream that takes everything: characters it cannot encode are written as escapes.

    When it is closed, full or read by nobody any more, the rest of the text is dropped, and ``error`` says why.
    """

    def __init__(self, stream: TextIO | None):
        self.error: Exception | None = None
        self._stream = stream or _nowhere()

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: Exception) -> None:
        self.error = error
        nowhere = _nowhere()
        try:  # What is still in the stream's buffer must go somewhere when Python ends.
            os.dup2(nowhere.fileno(), self._stream.fileno())
        except (OSError, ValueError):
            self._stream = nowhere


@contextlib.contextmanager
def printing_never_fails() -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.stderr`` for a while.

    A reader that has gone away, as ``head`` does, is nothing to speak of; a full disk is told on standard error.
    """
    # Otherwise the first files that are opened would take the places of closed streams, and get what is printed.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]  # they have all that a text stream has
    try:
        yield
    finally:
        out.flush()
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            err.write(f"ipt-fast: warning: standard output could not be written: {out.error}\n")
        err.flush()
        sys.stdout, sys.stderr = before


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")
