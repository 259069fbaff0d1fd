"""The training loop: plain PyTorch, resumable at any iteration with bitwise the same result."""

import contextlib
import csv
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from .._files import atomic_write
from ..models import create_model, open_model
from ..models._pretrained import PretrainedModel
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainingConfig, per_stage
from .distributed import World
from .objectives import Denoising, Pretraining, objective_of

LOG_FIELDS = ("iteration", "loss", "lr", "seconds", "psnr")


def build_model(config: TrainingConfig) -> PretrainedModel:
    """The model that ``config`` names, initialised from ``config.seed``, or loaded from a folder."""
    torch.manual_seed(config.seed)
    if Path(config.model).is_dir():
        if config.model_config:
            raise ValueError(
                f"model_config must be empty where model is a folder; got {config.model_config} for {config.model}"
            )
        model = open_model(config.model)
    else:
        model = create_model(config.model, **config.model_config)
    return model if config.task is None else model.only(config.task)


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
) -> Iterator[list[Tensor]]:
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
        )
        try:
            yield from loader
        except (ValueError, OSError, RuntimeError) as error:
            if not str(error).startswith("Caught "):
                raise
            # A worker's error holds its traceback, which ends with what went wrong.
            kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
            raise ValueError(message or kind) from error


def train(config: TrainingConfig, resume: bool = False) -> int:
    """Train until the last iteration, or until SIGINT or SIGTERM, which end it after the current one.

    ``config.out`` receives ``checkpoint.pth`` (everything a resume needs), ``log.csv`` and the EMA model as
    ``save_pretrained`` writes it, every ``save_every`` iterations and at the end. A run that was stopped and resumed on
    the same machine with the same number of threads gives bitwise the weights of one that was not.

    Returns:
        The number of finished iterations, ``config.total_iterations`` unless stopped.

    Raises:
        ValueError: bad data, ``out`` already holds a run and ``resume`` is False, or it holds none or one with other
            settings and ``resume`` is True.
        OSError: ``out`` cannot be written.
        FloatingPointError: gradients are not finite; the last checkpoint stays.
    """
    run = _Run(config, resume)
    progress = tqdm(total=config.total_iterations, initial=run.iteration, unit="it", disable=run.world.rank > 0 or None)
    with _stop_on_signal() as stop_here, progress:
        for batch in batches(config, run.objective, run.iteration, run.world):
            run.step(batch)
            progress.update()
            stop = run.world.any(stop_here.is_set(), run.device)
            logged, saved = run.iteration % config.log_every == 0, run.iteration % config.save_every == 0
            saved |= run.iteration == config.total_iterations
            if logged or saved:
                progress.set_postfix(run.log(validate=saved))
            if saved or stop:
                run.save()
            if stop:
                break
    return run.iteration


class _Run:
    """State of a run: model, average, optimizer and counters, and their way to and from the files in ``config.out``."""

    def __init__(self, config: TrainingConfig, resume: bool):
        self.config = config
        self.checkpoint_path = config.out / "checkpoint.pth"
        self.log_path = config.out / "log.csv"
        if not resume and self.checkpoint_path.exists():
            raise ValueError(f"out must be a folder without a training run, or be resumed; got {config.out}")
        state = load_checkpoint(self.checkpoint_path) if resume else None
        if state is not None:
            config.check_resumable(state["config"])

        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.world = World.join(self.device.type)
        model: Any = build_model(config)  # PyTorch's stubs of `to` lack the memory format
        self.model: PretrainedModel = model.to(self.device, memory_format=torch.channels_last).train()
        self.objective = objective_of(config, self.model, self.world)
        self.average: Any = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.lr,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.iteration = 0
        self.loss_sum = torch.zeros((), device=self.device)  # since the last row of the log
        self.loss_count = 0
        self.seconds = 0.0
        if state is not None:
            self._load(state)
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out must be a folder that can be made; got {config.out}: {error.strerror}") from error
        self._start_log()
        self.started = time.perf_counter() - self.seconds

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
        self.seconds = time.perf_counter() - self.started
        row = {
            "iteration": str(self.iteration),
            "loss": f"{loss:.6f}",
            "lr": f"{self.optimizer.param_groups[0]['lr']:.3e}",
            "seconds": f"{self.seconds:.1f}",
            "psnr": "" if psnr is None else f"{psnr:.3f}",
        }
        if self.world.rank == 0:
            with self.log_path.open("a", newline="") as file:
                csv.DictWriter(file, LOG_FIELDS).writerow(row)
        return row

    def save(self) -> None:
        """Write the checkpoint, then the averaged model; the first process does."""
        if self.world.rank:
            return
        cuda = self.device.type == "cuda"
        state = {
            "config": self.config.to_dict(),
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

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
        self.loss_sum.copy_(state["loss_sum"])
        self.loss_count = state["loss_count"]
        self.seconds = state["seconds"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _start_log(self) -> None:
        """Keep the rows up to the checkpoint's iteration: a killed run may have logged more."""
        if self.world.rank:
            return
        rows = []
        if self.iteration and self.log_path.exists():
            with self.log_path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["iteration"]) <= self.iteration]
        with atomic_write(self.log_path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(rows)


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
