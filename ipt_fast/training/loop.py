"""The training loop, resumable at any iteration with bitwise the same result.

What a run is at any time, and its files, is in :mod:`ipt_fast.training.run`; where its batches come from in
:mod:`ipt_fast.training.loading`; what several processes do in :mod:`ipt_fast.training.parallel`.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
from tqdm import tqdm

from .._files import atomic_write as atomic_write  # an "as" marks names that are kept for older imports
from ..models import create_model as create_model
from ..models import open_model as open_model
from ..models._pretrained import PretrainedModel as PretrainedModel
from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import save_checkpoint as save_checkpoint
from .config import TrainingConfig
from .config import per_stage as per_stage
from .distributed import World
from .loading import batches
from .log import LOG_FIELDS as LOG_FIELDS
from .objectives import Denoising as Denoising
from .objectives import Pretraining as Pretraining
from .objectives import objective_of as objective_of
from .run import Run
from .run import build_model as build_model
from .run import learning_rate as learning_rate

# What making a batch can fail with.
_DATA_ERRORS = (ValueError, OSError, RuntimeError, ImportError, MemoryError)

_SHOWN = (
    "loss",
    "psnr",
    "val_loss",
    "images_per_second",
    "data_wait",
    "peak_memory_mb",
)  # of a row of the log, by the progress bar


def train(config: TrainingConfig, resume: bool = False, say: Callable[[str], None] = lambda line: None) -> int:
    """Train until the last iteration, or until SIGINT or SIGTERM, which end it after the current one.

    ``config.out`` receives a checkpoint (everything a resume needs, see :mod:`ipt_fast.training.checkpoint`),
    ``log.csv`` and the EMA model as ``save_pretrained`` writes it, every ``save_every`` iterations and at the end. A
    run that was stopped and resumed on the same machine with the same number of threads and processes gives bitwise the
    weights of one that was not. Where the data have changed since, a UserWarning says so.

    Args:
        say: takes a line at the end, which sums up how fast the run was.

    Returns:
        The number of finished iterations, ``config.total_iterations`` unless stopped.

    Raises:
        ValueError: bad data, ``out`` already holds a run and ``resume`` is False, or it holds none or one with other
            settings and ``resume`` is True. Where an image fails in the middle, the work so far is saved first.
        OSError: ``out`` cannot be written; the last checkpoint stays.
        FloatingPointError: the loss, gradients or weights are not finite; the message names the first module at fault,
            and the last checkpoint stays.
        ImportError: ``tensorboard`` is set, and not installed.
        FailedElsewhereError: another one of several processes failed.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    world = World.join()
    run = world.together(lambda: Run(config, resume, world))
    try:
        world.together(run.start)
        _train(run)
    except BaseException:
        run.leave_nothing()
        raise
    finally:
        run.log_file.close()
    if world.rank == 0 and (summary := run.summary()):
        say(summary)
    return run.iteration


def _train(run: Run) -> None:
    config, world = run.config, run.world
    progress = tqdm(total=config.total_iterations, initial=run.iteration, unit="it", disable=world.rank > 0 or None)
    loading = contextlib.closing(batches(config, run.objective, run.iteration, world))
    with _stop_on_signal() as stop_here, progress, loading as source:
        while run.iteration < config.total_iterations:
            failure: Exception | None = None
            try:
                with run.pace.waiting():
                    batch = [] if stop_here.is_set() else next(source)
            except _DATA_ERRORS as error:
                if not stop_here.is_set():  # a SIGTERM to all processes of a group ends workers, too
                    failure = error
            if world.any(stop_here.is_set() or failure is not None):
                if run.iteration or failure is None:
                    world.together(run.save)
                    failure = failure and ValueError(
                        f"{failure}; the {run.iteration} iterations before it are saved in {config.out}"
                    )
                world.fail(failure)
                return
            run.step(batch)
            progress.update()
            logged, saved = run.iteration % config.log_every == 0, run.iteration % config.save_every == 0
            saved |= run.iteration == config.total_iterations
            if logged or saved:
                row = world.together(lambda validate=saved: run.log(validate))  # type: ignore[misc]
                progress.set_postfix({name: row[name] for name in _SHOWN if row[name]})
            if saved:
                world.together(run.save)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        stop.set()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
