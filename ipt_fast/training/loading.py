"""The batches of a run: numbered samples, of which each of several processes loads its share."""

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .config import TrainingConfig, per_stage
from .distributed import World
from .generation import Generation
from .objectives import Denoising, Pretraining


class _Numbers(Sampler[int]):
    """A share of the samples of every batch; ``starts``: the batches' first samples."""

    def __init__(self, starts: range, share: range):
        self.starts, self.share = starts, share

    def __iter__(self) -> Iterator[int]:
        return (start + place for start in self.starts for place in self.share)

    def __len__(self) -> int:
        return len(self.starts) * len(self.share)


def batches(
    config: TrainingConfig, objective: Denoising | Pretraining | Generation, start: int, world: World
) -> Generator[list[Tensor]]:
    """This process's part of the batches of iterations ``start``, ``start`` + 1 … to the end of the last stage.

    Whatever the number of processes, a batch has the same samples. They lie in pinned memory where a GPU is used.
    """
    stages = list(zip(per_stage(config.iterations), objective.patch_sizes, per_stage(config.batch_size), strict=True))
    first_sample = 0
    for iterations, patch, batch in stages:
        skipped, share = min(start, iterations), world.share(batch)
        start -= skipped
        numbers = _Numbers(range(first_sample + skipped * batch, first_sample + iterations * batch, batch), share)
        first_sample += iterations * batch
        # Its own generator: a loader's start must not advance the global one, which the model may use.
        loader = DataLoader(
            objective.dataset(patch, batch),
            len(share),
            sampler=numbers,
            num_workers=config.workers,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available() and (config.device or "cuda").startswith("cuda"),
        )
        try:
            loading = iter(loader)
            with _undisturbed_by_deaths() if config.workers else contextlib.nullcontext():
                yield from loading
        except (ValueError, OSError, RuntimeError) as error:
            if not str(error).startswith("Caught "):
                raise
            # A worker's error holds its traceback, which ends with what went wrong.
            kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
            raise ValueError(message or kind) from error


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the main one stops the others, by SIGTERM where they hang."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _undisturbed_by_deaths() -> Iterator[None]:
    """Without the handler by which PyTorch raises an error for a dead worker anywhere, as in the middle of a step.

    The loader raises one too, some seconds later, where it waits for a batch: there the state of the run is whole.
    """
    if threading.current_thread() is not threading.main_thread():  # where handlers run
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)
