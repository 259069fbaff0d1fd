"""What a model is trained for: where its batches come from, and the loss and the quick PSNR of a model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.dataset import ImageFolder as ImageFolder  # an "as" marks names that programs import from here
from ..data.dataset import NoisyPatches as NoisyPatches
from ..data.dataset import Patches
from ..data.dataset import TaskPatches as TaskPatches
from ..data.degradations import find_task
from ..data.stream import MEMORY_BUDGET, ImageStream, PairStream, TrainingData, open_source
from ..models._pretrained import PretrainedModel
from ..models.contract import Contract
from ..models.ipt import scale_of as scale_of
from .config import GENERATE, TrainingConfig, per_stage
from .distributed import World
from .generation import Generation
from .losses import LOSSES, contrastive_loss
from .validation import TaskValidation as TaskValidation
from .validation import Validation
from .validation import ValidationSet as ValidationSet


class Restoration:
    """What every model is trained for: to make the clean image of a degraded one, by one task or a mixture of them.

    Losses are taken in the model's range of values.
    """

    def __init__(self, config: TrainingConfig, model: PretrainedModel, world: World):
        contract = model.contract
        if not config.is_default("flip"):
            raise ValueError(f"flip must be left out for {type(model).__name__}, no generator; got {config.flip}")
        self.config, self.world, self.value_range = config, world, contract.value_range
        self.patch_sizes = per_stage(config.patch_size or (contract.image_size or 128,) * len(config.stages))
        self.tasks = _tasks_of(config, contract)
        self.loss_function = LOSSES[config.loss]
        self.images = _open_data(config, contract, self.tasks)
        self._check_noise_levels(type(model).__name__, contract)
        for stream in self.images.streams:
            stream.preload(max(1, config.workers))
        # A task that the images do not serve, or a later stage's patch that none is large enough for, must show now.
        for patch in self.patch_sizes:
            self.dataset(patch, 1)
        for task in self.tasks:
            Patches(self.images, self.patch_sizes[0], {task: 1.0}, **self._drawing)[0]
        if world.rank == 0:
            self.images.warn_of_skipped()
        self.validation = self._open_validation(contract) if config.val else None

    @property
    def _drawing(self) -> dict[str, Any]:
        """The settings by which patches are drawn."""
        return {"sigma": self.config.sigma, "enlarge": self.config.enlarge, "seed": self.config.seed}

    def dataset(self, patch_size: int, batch_size: int) -> Dataset:
        return Patches(self.images, patch_size, self.tasks, **self._drawing)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        degraded, clean = (each.contiguous(memory_format=torch.channels_last) for each in batch)
        with _autocast(self.config, degraded):
            output = model(degraded * self.value_range)
        return self.loss_function(output, clean * self.value_range)

    def _check_noise_levels(self, name: str, contract: Contract) -> None:
        """Raise ValueError where a level is set that nothing would have."""
        config, clean = self.config, any(isinstance(stream, ImageStream) for stream in self.images.streams)
        takes_level = any(find_task(task).draws_sigma for task in self.tasks)
        if not (clean and takes_level or config.is_default("sigma")):
            names = ", ".join(self.tasks)
            raise ValueError(f"sigma must be left out where no task is denoise, of {names}; got {config.sigma}")
        if config.is_default("val_sigma"):
            return
        if contract.tasks:
            raise ValueError(f"val_sigma must be left out for {name}, whose tasks tell theirs; got {config.val_sigma}")
        if config.val is None or config.val_target is not None or not takes_level:
            raise ValueError(
                "val_sigma must be left out where val is, whose noise it is, or has noise already; "
                f"got {config.val_sigma}"
            )

    def _open_validation(self, contract: Contract) -> Validation:
        config = self.config
        source = open_source(
            _folders(config.val), config.val_target, _channels(contract), _scale(contract, self.tasks), 1, 0
        )
        sigma = config.sigma if contract.tasks else (config.val_sigma, config.val_sigma)
        return Validation(source, self.tasks, contract.image_size, sigma)


class Denoising(Restoration):
    """:class:`Restoration` by a model that does one thing, of images of any size; its name is older than its tasks."""

    def __init__(self, config: TrainingConfig, model: PretrainedModel, world: World):
        if config.contrastive:
            raise ValueError(
                f"contrastive must be 0 for {type(model).__name__}, without patch features; got {config.contrastive}"
            )
        super().__init__(config, model, world)


class Pretraining(Restoration):
    """The tasks of an IPT, one a batch: the supervised loss and, times ``contrastive``, the contrastive one (eq. 6).

    The paper's λ of 0.1 goes with values in 0..255.
    """

    def __init__(self, config: TrainingConfig, model: PretrainedModel, world: World):
        size = model.contract.image_size
        if size is None:
            raise ValueError(f"image_size must be a size for pre-training; got none in {type(model).__name__}")
        if config.patch_size and set(per_stage(config.patch_size)) != {size}:
            raise ValueError(f"patch_size must be {size}, the model's image_size, or left out; got {config.patch_size}")
        if config.contrastive and min(per_stage(config.batch_size)) < 2:
            raise ValueError(f"batch_size must be at least 2 for the contrastive loss; got {config.batch_size}")
        super().__init__(config, model, world)

    def dataset(self, patch_size: int, batch_size: int) -> Dataset:
        return Patches(self.images, patch_size, self.tasks, batch_size=batch_size, **self._drawing)

    def loss(self, model: PretrainedModel, batch: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        degraded, clean, task = batch
        with _autocast(self.config, degraded):
            output, features = model.forward_with_features(degraded * self.value_range, list(self.tasks)[int(task[0])])
        loss = self.loss_function(output, clean * self.value_range)
        if self.config.contrastive:
            everyone = self.world.gather(features)
            loss = loss + self.config.contrastive * contrastive_loss(
                features, everyone, self.world.rank * len(features)
            )
        return loss


# By the names that models' contracts have for them.
OBJECTIVES: dict[str, type[Denoising] | type[Pretraining] | type[Generation]] = {
    "denoising": Denoising,
    "pretraining": Pretraining,
    "diffusion": Generation,
}


def objective_of(config: TrainingConfig, model: PretrainedModel, world: World) -> Denoising | Pretraining | Generation:
    """What ``model`` can be trained for.

    Raises:
        ValueError: its contract names no objective there is, or the settings do not go with it.
    """
    if model.contract.objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {model.contract.objective!r}")
    if config.task == GENERATE and model.contract.objective != "diffusion":
        raise ValueError(f"model must be a generator for task {GENERATE}, such as dit_s_2; got {type(model).__name__}")
    return OBJECTIVES[model.contract.objective](config, model, world)


def _tasks_of(config: TrainingConfig, contract: Contract) -> dict[str, float]:
    """{name: how often} of the tasks that are trained, in the model's order where it has tasks of its own."""
    given = {config.task: 1.0} if isinstance(config.task, str) else config.task
    if not contract.tasks:
        return given or {"denoise": 1.0}
    if unknown := [name for name in given or {} if name not in contract.tasks]:
        raise ValueError(f"task must be of {', '.join(contract.tasks)}; got {', '.join(unknown)}")
    return {name: given[name] if given else 1.0 for name in contract.tasks if not given or name in given}


def _scale(contract: Contract, tasks: dict[str, float]) -> int:
    """How many times larger than its input the target of a pair is."""
    return contract.scale(next(iter(tasks)) if contract.tasks else None)


def _channels(contract: Contract) -> tuple[int, ...]:
    """Of each input of a pair, and of its target."""
    target = contract.out_channels or contract.in_channels or 3
    views = max(1, (contract.in_channels or target) // target)
    return (*[(contract.in_channels or target) // views] * views, target)


def _open_data(config: TrainingConfig, contract: Contract, tasks: dict[str, float]) -> TrainingData:
    """The sources of a run.

    Raises:
        ValueError: there is none, or the model's channels or magnification are not those of its tasks.
    """
    *inputs, target = channels = _channels(contract)
    if not set(channels) <= {1, 3} or len(inputs) > 2:
        raise ValueError(
            "in_channels and out_channels must be 1 or 3, or in_channels twice as many; "
            f"got {contract.in_channels} and {contract.out_channels}"
        )
    budget = MEMORY_BUDGET // len(config.sources) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    streams = [
        open_source(folders, partner, channels, _scale(contract, tasks), shrinking, budget)
        for folders, partner, shrinking in config.sources
    ]
    if config.task is not None and not contract.tasks and all(isinstance(stream, PairStream) for stream in streams):
        raise ValueError(f"task must be left out where all data are pairs, degraded already; got {config.task!r}")
    if any(isinstance(stream, PairStream) for stream in streams) and contract.tasks and len(tasks) > 1:
        raise ValueError(f"task must be the one that the pairs are for; got {', '.join(tasks)}")
    for name in tasks if any(isinstance(stream, ImageStream) for stream in streams) else ():
        task = find_task(name)
        if sum(inputs) != task.degradation.views * target:
            expected = task.degradation.views * target
            raise ValueError(f"in_channels must be {expected} for {name}, made of clean images; got {sum(inputs)}")
        if task.scale != contract.scale(name if contract.tasks else None):
            scale = contract.scale(name if contract.tasks else None)
            raise ValueError(f"task must magnify {scale} times, as the model does; got {name}")
    return TrainingData(streams, config.data_weights)


def _folders(value: Path | tuple[Path, ...] | None) -> tuple[Path, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _autocast(config: TrainingConfig, images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp == "bf16")
