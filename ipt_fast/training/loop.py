"""The training loop: plain PyTorch, resumable at any iteration with bitwise the same result."""

import contextlib
import csv
import dataclasses
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from .._files import atomic_write, is_stream, make_folder, naming
from ..models import create_model, list_models, open_model
from ..models._pretrained import PretrainedModel
from ..models._registry import CLASSES
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainingConfig, per_stage
from .distributed import World
from .objectives import Denoising, Pretraining, objective_of

LOG_FIELDS = ("iteration", "loss", "lr", "seconds", "psnr")
# What making a batch can fail with.
_DATA_ERRORS = (ValueError, OSError, RuntimeError, ImportError, MemoryError)


def build_model(config: TrainingConfig) -> PretrainedModel:
    """The model that ``config`` names, initialised from ``config.seed``, or loaded from a folder."""
    torch.manual_seed(config.seed)
    if config.model in list_models():
        model = create_model(config.model, **config.model_config)
    elif not Path(config.model).is_dir():
        names = ", ".join(list_models())
        raise ValueError(f"model must be a folder written by save_pretrained or one of {names}; got {config.model}")
    else:
        if config.model_config:
            raise ValueError(
                f"model_config must be empty where model is a folder; got {config.model_config} for {config.model}"
            )
        model = open_model(config.model)
    return model.only(config.task) if isinstance(config.task, str) and model.contract.tasks else model


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Rate of the update that follows ``iteration`` finished ones: linear warm-up, then the schedule."""
    if iteration < config.warmup:
        return config.lr * (iteration + 1) / config.warmup
    if config.schedule == "step":
        return config.lr if 3 * iteration < 2 * config.total_iterations else config.lr_min
    progress = (iteration - config.warmup) / max(1, config.total_iterations - config.warmup)
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


class _Numbers(Sampler[int]):
    """A share of the samples of every batch; ``starts``: the batches' first samples."""

    def __init__(self, starts: range, share: range):
        self.starts, self.share = starts, share

    def __iter__(self) -> Iterator[int]:
        return (start + place for start in self.starts for place in self.share)

    def __len__(self) -> int:
        return len(self.starts) * len(self.share)


def batches(
    config: TrainingConfig, objective: Denoising | Pretraining, start: int, world: World
) -> Generator[list[Tensor]]:
    """This process's part of the batches of iterations ``start``, ``start`` + 1 … to the end of the last stage."""
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


def train(config: TrainingConfig, resume: bool = False) -> int:
    """Train until the last iteration, or until SIGINT or SIGTERM, which end it after the current one.

    ``config.out`` receives ``checkpoint.pth`` (everything a resume needs), ``log.csv`` and the EMA model as
    ``save_pretrained`` writes it, every ``save_every`` iterations and at the end. A run that was stopped and resumed on
    the same machine with the same number of threads gives bitwise the weights of one that was not. Where the data have
    changed since, a UserWarning says so.

    Returns:
        The number of finished iterations, ``config.total_iterations`` unless stopped.

    Raises:
        ValueError: bad data, ``out`` already holds a run and ``resume`` is False, or it holds none or one with other
            settings and ``resume`` is True. Where an image fails in the middle, the work so far is saved first.
        OSError: ``out`` cannot be written; the last checkpoint stays.
        FloatingPointError: gradients are not finite; the last checkpoint stays.
        FailedElsewhereError: another one of several processes failed.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    world = World.join()
    run = world.together(lambda: _Run(config, resume, world))
    try:
        world.together(run.start)
        _train(run)
    except BaseException:
        run.leave_nothing()
        raise
    return run.iteration


def _train(run: "_Run") -> None:
    config, world = run.config, run.world
    progress = tqdm(total=config.total_iterations, initial=run.iteration, unit="it", disable=world.rank > 0 or None)
    loading = contextlib.closing(batches(config, run.objective, run.iteration, world))
    with _stop_on_signal() as stop_here, progress, loading as source:
        while run.iteration < config.total_iterations:
            failure: Exception | None = None
            try:
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
                progress.set_postfix(world.together(lambda validate=saved: run.log(validate)))  # type: ignore[misc]
            if saved:
                world.together(run.save)


class _Run:
    """State of a run: model, average, optimizer and counters, and their way to and from the files in ``config.out``."""

    def __init__(self, config: TrainingConfig, resume: bool, world: World | None = None):
        self.config = config
        self.world = world or World.join()
        self.checkpoint_path = config.out / "checkpoint.pth"
        self.log_path = config.out / "log.csv"
        for name in ("checkpoint.pth", "log.csv", "config.json", "model.safetensors"):
            if is_stream(config.out / name):  # it could hang, and there would be nothing to resume
                raise ValueError(f"{name} in out must be a file; got {config.out / name}, which is none")
        if not resume and self.checkpoint_path.exists():
            raise ValueError(f"out must be a folder without a training run, or be resumed; got {config.out}")
        state = load_checkpoint(self.checkpoint_path) if resume else None
        if state is not None:
            config.check_resumable(state["config"])

        self.device = self.world.device(config.device)
        for batch in per_stage(config.batch_size):
            self.world.share(batch)
        # A resumed run needs no folder of the model that it started from.
        model: Any = _rebuilt(state["architecture"]) if state and "architecture" in state else build_model(config)
        self.model: PretrainedModel = model.to(self.device, memory_format=torch.channels_last).train()
        self.objective = objective_of(config, self.model, self.world)
        self.data = self.objective.images.fingerprint()
        self.average: Any = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.iteration = 0
        self.saved: int | None = None  # iteration of the last save
        self.loss_sum = torch.zeros((), device=self.device)  # since the last row of the log
        self.loss_count = 0
        self.seconds = 0.0
        if state is not None:
            self._load(state)
        self.made: list[Path] = []  # folders
        self.log_started = False
        self.started = time.perf_counter() - self.seconds

    def start(self) -> None:
        """Make the folder and the log; until here nothing is written."""
        if self.world.rank:
            return
        out = self.config.out
        self.made = [folder for folder in (out, *out.parents) if not folder.exists()]
        make_folder("out", out)
        self._start_log()
        self.log_started = True

    def step(self, batch: list[Tensor]) -> None:
        """One update of the weights and of their average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.iteration)
        loss = self.objective.loss(self.model, [each.to(self.device) for each in batch])
        self.optimizer.zero_grad()
        loss.backward()
        self.world.average_gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradients are not finite after {self.iteration} iterations, loss {loss.item()}")
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.loss_sum += loss.detach()
        self.loss_count += 1
        self.iteration += 1

    def log(self, validate: bool) -> dict[str, str]:
        """Append a row to the log and return it."""
        loss = self.world.mean(self.loss_sum).item() / self.loss_count
        self.loss_sum.zero_()
        self.loss_count = 0
        validation = self.objective.validation if validate and self.world.rank == 0 else None
        psnr = validation.psnr(self.average.module, self.device) if validation else None
        self.objective.images.warn_of_skipped()
        self.seconds = time.perf_counter() - self.started
        row = {
            "iteration": str(self.iteration),
            "loss": f"{loss:.6f}",
            "lr": f"{self.optimizer.param_groups[0]['lr']:.3e}",
            "seconds": f"{self.seconds:.1f}",
            "psnr": "" if psnr is None else f"{psnr:.3f}",
        }
        if self.world.rank == 0:
            with naming(self.log_path), self.log_path.open("a", newline="") as file:
                csv.DictWriter(file, LOG_FIELDS).writerow(row)
        return row

    def save(self) -> None:
        """Write the checkpoint, then the averaged model; the first process does."""
        if self.world.rank or self.saved == self.iteration:
            return
        cuda = self.device.type == "cuda"
        state = {
            "config": self.config.to_dict(),
            "architecture": json.dumps({"model": type(self.model).__name__, **dataclasses.asdict(self.model.config)}),
            "data": self.data,
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "seconds": time.perf_counter() - self.started,
        }
        save_checkpoint(self.checkpoint_path, state)
        self.average.module.save_pretrained(self.config.out)
        self.saved = self.iteration

    def leave_nothing(self) -> None:
        """Remove the folder that this run has made, if it ended before its first iteration."""
        if self.world.rank or self.iteration or self.checkpoint_path.exists():
            return
        with contextlib.suppress(OSError):  # something else has come to lie there
            if self.log_started:
                self.log_path.unlink()
            for folder in self.made:
                folder.rmdir()

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = self.saved = state["iteration"]
        before = state.get("data", self.data)
        if before != self.data and self.world.rank == 0:
            changed = f"{before['images']} images then, {self.data['images']} now"
            if before["images"] == self.data["images"]:
                changed = f"{before['images']} images as then, but of other names or sizes"
            warnings.warn(
                f"data have changed since the run was saved ({changed}): {self.config.data}; the run goes on with them",
                stacklevel=2,
            )
        self.loss_sum.copy_(state["loss_sum"])
        self.loss_count = state["loss_count"]
        self.seconds = state["seconds"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _start_log(self) -> None:
        """Keep the rows up to the checkpoint's iteration: a killed run may have logged more, the last one in part."""
        rows = []
        if self.iteration and self.log_path.is_file():
            with self.log_path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
                rows = [row for row in whole if int(row["iteration"]) <= self.iteration]
        with naming(self.log_path), atomic_write(self.log_path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def _rebuilt(architecture: str) -> PretrainedModel:
    """A model of the shape that a checkpoint tells."""
    fields = json.loads(architecture)
    name = fields.pop("model")
    if name not in CLASSES:
        raise ValueError(f"model in the checkpoint must be one of {', '.join(CLASSES)}; got {name}")
    return CLASSES[name].from_fields(fields)


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
