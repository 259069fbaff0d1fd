"""A training run: its model, average, optimizer and counters, one step of it, and its files."""

import contextlib
import dataclasses
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .._files import atomic_write, is_stream, make_folder, naming, remove_abandoned
from ..models import create_model, list_models, open_model
from ..models._pretrained import PretrainedModel
from ..models._registry import CLASSES
from . import checkpoint, parallel
from .config import TrainingConfig, per_stage
from .diagnosis import first_fault
from .distributed import World
from .log import Log, Pace, peak_memory
from .objectives import objective_of
from .recipe import recipe_of


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
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr if 3 * iteration < 2 * config.total_iterations else config.lr_min
    progress = (iteration - config.warmup) / max(1, config.total_iterations - config.warmup)
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """State of a run, and its way to and from the files in ``config.out``.

    With several processes all of them make one, and call its methods together; the first one writes what is not
    sharded.
    """

    def __init__(self, config: TrainingConfig, resume: bool, world: World | None = None):
        self.config = config
        self.world = world or World.join()
        # What follows makes processes wait for each other, so all of them must have come so far.
        path, state = self.world.together(lambda: self._prepare(resume))
        self.loss: nn.Module = self._parallel_loss()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.iteration = 0
        self.saved: int | None = None  # iteration of the last save
        self.sums = torch.zeros(2, device=self.device)  # of loss and gradient norm, since the last row of the log
        self.count = 0
        if state is not None:
            self._load(path, state)
        self.made: list[Path] = []  # folders
        self.log_started = False
        self.started = time.perf_counter() - (state["seconds"] if state else 0.0)
        self.pace, self.total = Pace(), Pace()

    def _prepare(self, resume: bool) -> tuple[Path, dict[str, Any] | None]:
        """Check the settings, make the model and what it is trained for.

        Returns:
            The path and the content of the checkpoint of a run that is resumed.
        """
        config = self.config
        for name in (checkpoint.FILE, "log.csv", "config.json", "model.safetensors", "recipe.yml"):
            if is_stream(config.out / name):  # it could hang, and there would be nothing to resume
                raise ValueError(f"{name} in out must be a file; got {config.out / name}, which is none")
        path = checkpoint.find_checkpoint(config.out)
        if not resume and path.exists():
            raise ValueError(f"out must be a folder without a training run, or be resumed; got {config.out}")
        state = checkpoint.load_checkpoint(path) if resume else None
        if state is not None:
            config.check_resumable(state["config"])
        self.log_file = Log(config.out / "log.csv", config.tensorboard and self.world.rank == 0)
        self.device = self.world.device(config.device)
        for batch in per_stage(config.batch_size):
            self.world.share(batch, config.accumulate)
        # A resumed run needs no folder of the model that it started from.
        model: Any = _rebuilt(state["architecture"]) if state and "architecture" in state else build_model(config)
        self.model: PretrainedModel = model.to(self.device, memory_format=torch.channels_last).train()
        self.objective = objective_of(config, self.model, self.world)
        self.data = self.objective.images.fingerprint()
        self.average: Any = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        return path, state

    @property
    def sharded(self) -> bool:
        """Whether each process has only a part of every weight."""
        return self.config.strategy == "fsdp" and self.world.size > 1

    def _parallel_loss(self) -> nn.Module:
        loss = parallel.LossOf(self.model, self.objective)
        if self.config.activation_checkpointing:  # after the average, whose copies of layers would call these
            parallel.checkpoint_activations(self.model)
        if self.sharded:
            parallel.shard(loss, self.world, self.device)
            parallel.shard(self.average, self.world, self.device)
        elif self.world.size > 1:
            return parallel.replicate(loss, self.device)
        return loss

    def start(self) -> None:
        """Make the folder and the log; until here nothing is written."""
        if self.world.rank:
            return
        out = self.config.out
        self.made = [folder for folder in (out, *out.parents) if not folder.exists()]
        make_folder("out", out)
        if self.iteration or self.log_file.path.exists():
            remove_abandoned(out)
        self.log_file.start(self.iteration)
        self.log_started = True
        self.pace, self.total = Pace(), Pace()

    def step(self, batch: list[Tensor]) -> None:
        """One update of the weights and of their average, by this process's share of a batch.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; the weights are left as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.iteration)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        parts = self._micro_batches(batch)
        for number, part in enumerate(parts, 1):
            with parallel.accumulating(self.loss, last=number == len(parts)):
                part_loss = self.loss([each.to(self.device, non_blocking=True) for each in part]) / len(parts)
                part_loss.backward()
            loss += part_loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        values = torch.stack([loss, parallel.whole(norm)])
        if self.world.any(not torch.isfinite(values).all()):
            raise FloatingPointError(
                f"gradients are not finite after {self.iteration} iterations, loss {loss.item()}: {self._fault(parts)}"
            )
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.sums += values
        self.count += 1
        self.iteration += 1
        self.pace.images += len(batch[0]) * self.world.size

    def _micro_batches(self, batch: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(each.chunk(self.config.accumulate) for each in batch), strict=True))

    def _fault(self, parts: list[tuple[Tensor, ...]]) -> str:
        # Replicas need not exchange gradients now, shards have to come together.
        loss = self.loss if self.sharded else getattr(self.loss, "module", self.loss)
        moved = [[each.to(self.device) for each in part] for part in parts]
        return first_fault(loss, self.model, moved, self.world)

    def log(self, validate: bool) -> dict[str, str]:
        """Append a row to the log and return it."""
        loss, norm = (self.world.mean(self.sums) / self.count).tolist()
        self.sums.zero_()
        self.count = 0
        images, seconds, waited = self._take_pace()
        measured = {"psnr": "", "val_loss": ""}
        if validate and self.objective.validation:
            average = self._whole_average()
            if average is not None:
                measured |= self.objective.validation.measured(average, self.device)
        self.objective.images.warn_of_skipped()
        row = {
            "iteration": str(self.iteration),
            "loss": f"{loss:.6f}",
            "lr": f"{self.optimizer.param_groups[0]['lr']:.3e}",
            "seconds": f"{time.perf_counter() - self.started:.1f}",
            "grad_norm": f"{norm:.4g}",
            "images_per_second": f"{images / seconds:.4g}",
            "data_wait": f"{waited / seconds:.4f}",
            "peak_memory_mb": f"{peak_memory(self.device):.0f}",
            "skipped": str(self.objective.images.warn_of_skipped()) if self.world.rank == 0 else "",
            **measured,
        }
        if self.world.rank == 0:
            self.log_file.write(row)
        self.pace = Pace()  # without the time of validation
        return row

    def summary(self) -> str | None:
        """How fast the run was since it was started or resumed, in one line; None where it did no step."""
        self._take_pace()
        images, seconds, waited = self.total.images, time.perf_counter() - self.total.since, self.total.waited
        if not images:
            return None
        skipped = self.objective.images.warn_of_skipped()
        return (
            f"trained on {images} images in {seconds:.1f} s: {images / seconds:.4g} images/s, "
            f"{100 * waited / seconds:.1f} % of the time waiting for data, "
            f"peak memory {peak_memory(self.device):.0f} MB"
            + (f"; {skipped} images that could not be used were skipped" if skipped else "")
        )

    def _take_pace(self) -> tuple[int, float, float]:
        images, seconds, waited = self.pace.taken()
        self.total.images += images
        self.total.waited += waited
        return images, seconds, waited

    def _whole_average(self) -> PretrainedModel | None:
        """The averaged model; None in all processes but the first, which need not have it."""
        if not self.sharded:
            return self.average.module if self.world.rank == 0 else None
        state = {}
        for name, tensor in self.average.module.state_dict().items():
            value = parallel.whole(tensor)
            if self.world.rank == 0:
                state[name] = value
        if self.world.rank:
            return None
        model = _rebuilt(self._architecture())
        model.load_state_dict(state)
        return model.to(self.device)

    def save(self) -> None:
        """Write the checkpoint, then the averaged model.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written.
        """
        if self.saved == self.iteration:
            return
        self._check_weights()
        out = self.config.out
        cuda = self.device.type == "cuda"
        loss_sum, norm_sum = self.world.mean(self.sums).cpu()
        values = {
            "config": self.config.to_dict(),
            "architecture": self._architecture(),
            "data": self.data,
            "iteration": self.iteration,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "loss_sum": loss_sum,
            "norm_sum": norm_sum,
            "loss_count": self.count,
            "seconds": time.perf_counter() - self.started,
        }
        kept = out / checkpoint.FILE
        if self.sharded:
            kept = checkpoint.save_sharded(out, self._tensors(), values, self.world)
        elif self.world.rank == 0:
            parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
            checkpoint.save_checkpoint(kept, {**values, **parts})
        average = self._whole_average()
        if average is not None:
            average.save_pretrained(out)
            with naming(out / "recipe.yml"), atomic_write(out / "recipe.yml") as temporary:
                temporary.write_text(recipe_of(self.config))
            checkpoint.remove_others(out, kept)
        self.saved = self.iteration

    def leave_nothing(self) -> None:
        """Remove the folder that this run has made, if it ended before its first iteration."""
        if self.world.rank or self.iteration or checkpoint.find_checkpoint(self.config.out).exists():
            return
        with contextlib.suppress(OSError):  # something else has come to lie there
            if self.log_started:
                self.log_file.path.unlink()
            for folder in self.made:
                folder.rmdir()

    def _architecture(self) -> str:
        return json.dumps({"model": type(self.model).__name__, **dataclasses.asdict(self.model.config)})

    def _check_weights(self) -> None:
        bad = (name for name, p in self.model.named_parameters() if not parallel.own_part(p).isfinite().all())
        name = self.world.first(next(bad, None))
        if name is not None:
            raise FloatingPointError(f"weights are not finite after {self.iteration} iterations: {name}")

    def _tensors(self, optimizer_names: list[str] | None = None) -> dict[str, Tensor]:
        """All tensors of the state by names that hold for any number of processes.

        Args:
            optimizer_names: of the optimizer's, which are made now, zero; None takes those that there are.
        """
        model = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        average = {f"average.{name}": value for name, value in self.average.state_dict().items()}
        return model | average | self._optimizer_tensors(optimizer_names)

    def _optimizer_tensors(self, names: list[str] | None) -> dict[str, Tensor]:
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if names is None:
            states = self.optimizer.state
            return {f"optimizer.{n}.{key}": v for n, p in parameters.items() for key, v in states.get(p, {}).items()}
        tensors = {}
        for name in names:
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            tensors[name] = torch.zeros(()) if key == "step" else torch.zeros_like(parameters[parameter])
        return tensors

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        if path.is_dir():
            self._load_sharded(path)
        else:
            for module, name in ((self.model, "model"), (self.average, "average")):
                own = module.state_dict()
                module.load_state_dict({n: parallel.sharded_like(v, own.get(n, v)) for n, v in state[name].items()})
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            moments = {
                index: {k: v if k == "step" else parallel.sharded_like(v, parameters[index]) for k, v in entry.items()}
                for index, entry in state["optimizer"]["state"].items()
            }
            self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
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
        self.sums[0], self.sums[1] = state["loss_sum"], state.get("norm_sum", 0)
        self.count = state["loss_count"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _load_sharded(self, folder: Path) -> None:
        stored = self.world.together(lambda: checkpoint.stored_names(folder))
        names = [name for name in stored if name.startswith("optimizer.")]
        tensors = self._tensors(names)
        checkpoint.load_sharded(folder, tensors, self.world)  # in place, but for the optimizer
        moments: dict[int, dict[str, Tensor]] = {}
        numbers = {name: i for i, name in enumerate(n for n, p in self.model.named_parameters() if p.requires_grad)}
        for name in names:
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            moments.setdefault(numbers[parameter], {})[key] = tensors[name]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def _rebuilt(architecture: str) -> PretrainedModel:
    """A model of the shape that a checkpoint tells."""
    fields = json.loads(architecture)
    name = fields.pop("model")
    if name not in CLASSES:
        raise ValueError(f"model in the checkpoint must be one of {', '.join(CLASSES)}; got {name}")
    return CLASSES[name].from_fields(fields)
