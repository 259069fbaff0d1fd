"""What a model is trained for: where its batches come from, and the loss and the quick PSNR of a model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.dataset import ImageFolder, NoisyPatches, TaskPatches
from ..data.stream import ImageStream
from ..models._pretrained import PretrainedModel
from ..models.ipt import scale_of as scale_of  # programs import it from here
from .config import TrainingConfig, per_stage
from .distributed import World
from .losses import LOSSES, contrastive_loss
from .validation import TaskValidation, ValidationSet


class Denoising:
    """Blind Gaussian denoising with a model of images of any size; losses are taken in the model's range of values."""

    def __init__(self, config: TrainingConfig, model: PretrainedModel, world: World):
        channels = model.contract.in_channels
        if channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3 for a denoising model; got {channels}")
        if config.contrastive:
            raise ValueError(
                f"contrastive must be 0 for {type(model).__name__}, without patch features; got {config.contrastive}"
            )
        self.config, self.value_range = config, model.contract.value_range
        self.patch_sizes = per_stage(config.patch_size or (128,) * len(per_stage(config.iterations)))
        self.images = ImageFolder(config.data, channels)
        if config.val is None and not config.is_default("val_sigma"):
            raise ValueError(f"val_sigma must be left out where val is, whose noise it is; got {config.val_sigma}")
        self.loss_function = LOSSES[config.loss]
        for patch in self.patch_sizes:
            self.dataset(patch, 1)  # a later stage's bad patch size must show now
        self.validation = ValidationSet(config.val, channels, config.val_sigma) if config.val else None

    def dataset(self, patch_size: int, batch_size: int) -> Dataset:
        return NoisyPatches(self.images, patch_size, self.config.sigma, self.config.seed)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        noisy, clean = (each.contiguous(memory_format=torch.channels_last) for each in batch)
        with _autocast(self.config, noisy):
            output = model(noisy * self.value_range)
        return self.loss_function(output, clean * self.value_range)


class Pretraining:
    """All tasks of an IPT, one a batch: the supervised loss and, times ``contrastive``, the contrastive one (eq. 6).

    Losses are taken in the model's range of values, as the paper's λ of 0.1 goes with 0..255.
    """

    def __init__(self, config: TrainingConfig, model: PretrainedModel, world: World):
        contract = model.contract
        size = contract.image_size
        if size is None:
            raise ValueError(f"image_size must be a size for pre-training; got none in {type(model).__name__}")
        self.config, self.world, self.value_range = config, world, contract.value_range
        self.patch_sizes = per_stage(config.patch_size or (size,) * len(per_stage(config.iterations)))
        if set(self.patch_sizes) != {size}:
            raise ValueError(f"patch_size must be {size}, the model's image_size, or left out; got {self.patch_sizes}")
        if config.contrastive and min(per_stage(config.batch_size)) < 2:
            raise ValueError(f"batch_size must be at least 2 for the contrastive loss; got {config.batch_size}")
        if "denoise" not in contract.tasks and not config.is_default("sigma"):
            names = ", ".join(contract.tasks)
            raise ValueError(f"sigma must be left out where no task is denoise, of {names}; got {config.sigma}")
        if not config.is_default("val_sigma"):
            name = type(model).__name__
            raise ValueError(f"val_sigma must be left out for {name}, whose tasks tell theirs; got {config.val_sigma}")
        self.tasks = {task: contract.scale(task) for task in contract.tasks}
        self.images = ImageStream(config.data)
        self.loss_function = LOSSES[config.loss]
        for task in self.tasks.items():  # one without a degradation, or larger than the images, must show now
            TaskPatches(self.images, size, dict([task]), 1, config.sigma, config.seed)[0]
        self.validation = TaskValidation(config.val, self.tasks, size, config.sigma) if config.val else None

    def dataset(self, patch_size: int, batch_size: int) -> Dataset:
        return TaskPatches(self.images, patch_size, self.tasks, batch_size, self.config.sigma, self.config.seed)

    def loss(self, model: PretrainedModel, batch: Sequence[Tensor]) -> Tensor:
        degraded, clean, task = batch
        with _autocast(self.config, degraded):
            output, features = model.forward_with_features(degraded * self.value_range, int(task[0]))
        loss = self.loss_function(output, clean * self.value_range)
        if self.config.contrastive:
            everyone = self.world.gather(features)
            loss = loss + self.config.contrastive * contrastive_loss(
                features, everyone, self.world.rank * len(features)
            )
        return loss


# By the names that models' contracts have for them.
OBJECTIVES: dict[str, type[Denoising] | type[Pretraining]] = {"denoising": Denoising, "pretraining": Pretraining}


def objective_of(config: TrainingConfig, model: PretrainedModel, world: World) -> Denoising | Pretraining:
    """What ``model`` can be trained for.

    Raises:
        ValueError: its contract names no objective there is, or the settings do not go with it.
    """
    if model.contract.objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {model.contract.objective!r}")
    return OBJECTIVES[model.contract.objective](config, model, world)


def _autocast(config: TrainingConfig, images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp == "bf16")
