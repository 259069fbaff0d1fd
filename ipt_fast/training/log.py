"""What a run tells about its progress: ``log.csv``, TensorBoard, and how fast it goes."""

import csv
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._files import atomic_write, naming

# What is unknown is empty. Older logs have the first five alone, or all but the last.
LOG_FIELDS = (
    *("iteration", "loss", "lr", "seconds", "psnr"),
    *("grad_norm", "images_per_second", "data_wait", "peak_memory_mb", "skipped"),
    "val_loss",
)
_HEADERS = {",".join(LOG_FIELDS[:count]): count for count in (5, 10, len(LOG_FIELDS))}
_SCALARS = ("loss", "lr", "psnr", "val_loss", "grad_norm", "images_per_second")


def is_log(path: Path) -> bool:
    """Whether all that a resumed run would keep or drop of this file are rows of a log."""
    text = path.read_text(errors="replace")
    header, *rows = text.splitlines() or [""]
    whole = rows if text.endswith("\n") else rows[:-1]  # a killed run may have left half a row
    row = rf"\d+(,[^,]*){{{_HEADERS.get(header, 0) - 1}}}"
    return header in _HEADERS and all(re.fullmatch(row, each) for each in whole)


class Log:
    """The rows of ``log.csv`` and, where wanted, the same in a folder for TensorBoard.

    Raises:
        ImportError: TensorBoard is wanted, and not installed.
    """

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        self.path = path
        self.writer: Any = None
        self._folder = path.with_name("tensorboard") if tensorboard else None
        self._writer_class = _summary_writer() if tensorboard else None

    def start(self, iteration: int) -> None:
        """Keep the rows up to the checkpoint's iteration: a killed run may have logged more, the last one in part."""
        rows = []
        if iteration and self.path.is_file():
            with self.path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
                rows = [row for row in whole if int(row["iteration"]) <= iteration]
        with naming(self.path), atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        if self._writer_class:
            self.writer = self._writer_class(self._folder, purge_step=iteration + 1)

    def write(self, row: dict[str, str]) -> None:
        with naming(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, LOG_FIELDS).writerow(row)
        if self.writer:
            for name in _SCALARS:
                if row[name]:
                    self.writer.add_scalar(name, float(row[name]), int(row["iteration"]))
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


class Pace:
    """Images, seconds and seconds of waiting for data, since it was made or last :meth:`taken`."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.images = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the run waits for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    def taken(self) -> tuple[int, float, float]:
        """(images, seconds, seconds of waiting), and begin anew."""
        found = self.images, time.perf_counter() - self.since, self.waited
        self._begin()
        return found


def peak_memory(device: torch.device) -> float:
    """The most memory so far in MB (10⁶ bytes): of tensors on a GPU, resident memory of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'tensorboard must be installed to be written to, as `pip install "ipt-fast[train]"` does; got none'
        ) from error
    return SummaryWriter
