"""Restoring large collections of image files on Ray Data (the extra [ray]), on one machine or many.

Rows carry paths, never pixels, so what is in flight is small whatever the images are; Ray Data hands out as many rows
as the workers can take. All machines must see the files under the same paths.
"""

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import atomic_write
from ..data.io import check_writable_as, fill_hidden, read_image, write_image
from ..models import open_model
from . import Restorer

# What one image can fail with while the others go on.
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)
LARGEST_BLOCK = 32  # rows that a worker reports together


class RestoreFiles:
    """A class for ``ray.data.Dataset.map_batches``: each worker prepares the model once and restores files.

    Rows have the columns "source" and "destination", paths of image files; folders of destinations must be there. A
    result has these, and "sha256" of the file that was written, "seconds", and "error", which says why an image could
    not be restored and is "" otherwise: a bad image never stops the others.

    A destination is replaced at once when its content is whole, so there is no half of a file at any moment. Where Ray
    restarts a worker that was killed, it repeats that worker's rows, which writes the same again.

    Args:
        model: a module, a ``ray.ObjectRef`` of one (``ray.put(model)``), or what :func:`ipt_fast.models.open_model`
            takes, read by each worker.
        cpus: threads of a worker, as the ``num_cpus`` given to ``map_batches``.
        gpus: as its ``num_gpus``; a worker with less than a whole one counts on that part of its memory.
        max_pixels: see :func:`ipt_fast.data.io.read_image`.
        options: of :class:`ipt_fast.Restorer`; ``device`` is a GPU where the worker has one.

    Raises:
        ValueError, TypeError: a bad argument, when the workers start.
    """

    def __init__(
        self, model: Any, *, cpus: float = 1, gpus: float = 0, max_pixels: int | None = None, **options: Any
    ) -> None:
        self._restorer = worker_restorer(model, cpus=cpus, gpus=gpus, **options)
        self._max_pixels = max_pixels

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list]:
        """Restore the files of some rows."""
        rows = [
            self._restore(*map(os.fsdecode, paths)) for paths in zip(*(batch[name] for name in _PATHS), strict=True)
        ]
        return {name: [row[name] for row in rows] for name in (*_PATHS, "sha256", "seconds", "error")}

    def _restore(self, source: str, destination: str) -> dict[str, Any]:
        start, row = time.perf_counter(), {"source": source, "destination": destination, "sha256": "", "error": ""}
        try:
            image = fill_hidden(read_image(source, self._max_pixels))
            check_writable_as(Path(destination), image, self._restorer.scale)
            alpha = self._restorer.magnify_alpha(image.alpha)
            with atomic_write(destination) as path:
                write_image(path, dataclasses.replace(image, pixels=self._restorer(image.pixels), alpha=alpha))
                row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        except FAILURES as error:
            row |= {"sha256": "", "error": str(error) or type(error).__name__}
        return row | {"seconds": time.perf_counter() - start}


_PATHS = ("source", "destination")


def worker_restorer(model: Any, *, cpus: float, gpus: float, **options: Any) -> Restorer:
    """A restorer for a process that has so many CPUs and GPUs of its machine; sets the threads of PyTorch.

    Args:
        model, options: as of :class:`RestoreFiles`.
    """
    torch.set_num_threads(max(1, int(cpus)))
    if isinstance(model, str | os.PathLike):
        model = open_model(model)
    elif not isinstance(model, torch.nn.Module):
        model = require_ray().get(model)
    if options.get("device") is None:
        options["device"] = "cuda" if gpus and torch.cuda.is_available() else "cpu"
    restorer = Restorer(model, **options)
    on_cpu = restorer.device.type == "cpu"
    restorer.memory_share = min(1.0, cpus / (os.cpu_count() or 1) if on_cpu else gpus or 1.0)
    return restorer


def require_ray() -> Any:
    """The package ray, with ray.data.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"Ray Data is needed: pip install 'ipt-fast[ray]' ({error})") from error
    return ray


def workers_with_room(cpus: float, gpus: float) -> int:
    """How many processes with so many CPUs and GPUs the machines of the cluster hold; Ray must be started."""
    nodes = [node["Resources"] for node in require_ray().nodes() if node["Alive"]]
    return sum(
        int(min(node.get(name, 0) / part for name, part in (("CPU", cpus), ("GPU", gpus)) if part)) for node in nodes
    )


def map_rows(
    rows: Sequence[Mapping[str, Any]],
    worker: type,
    arguments: Mapping[str, Any],
    *,
    workers: int,
    num_cpus: float,
    num_gpus: float,
) -> Iterator[dict[str, Any]]:
    """The rows that ``worker``, a class as :class:`RestoreFiles`, makes of rows, as they come; Ray must be started.

    A worker that is killed is started again, and repeats the block of rows that it had not reported. A block is at most
    LARGEST_BLOCK rows, and at most a 64th of a worker's share.

    Args:
        rows: at least one.
        arguments: of the class's constructor.
        workers: as many at most.
        num_cpus, num_gpus: of each.
    """
    data = require_ray().data
    context = data.DataContext.get_current()
    context.enable_progress_bars = False  # callers show their own
    block = max(1, min(LARGEST_BLOCK, len(rows) // (64 * workers)))
    dataset = data.from_items(list(rows), override_num_blocks=-(-len(rows) // block)).map_batches(
        worker,
        fn_constructor_kwargs=dict(arguments),
        batch_size=None,
        compute=data.ActorPoolStrategy(size=min(workers, len(rows))),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    yield from dataset.iter_rows()
