"""Training of generators: to predict the noise in images or latents, and the variance of each step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..data.labelled import ClassImages, Labelled, NoisingExamples, open_labelled
from ..data.latents import CachedLatents
from ..data.stream import TrainingData
from ..diffusion import GaussianDiffusion
from ..models._pretrained import PretrainedModel
from .config import GENERATE, RESTORATION_FIELDS, TrainingConfig
from .distributed import World

_VALIDATED = 128  # examples, at as many timesteps
_AT_ONCE = 32


class Generation:
    """Denoising diffusion (Ho et al. 2020) with the hybrid loss of Nichol & Dhariwal 2021.

    What is noised, how much and by what noise is a pure function of the seed and the sample's number. Which labels are
    dropped for guidance is for the model, which draws it by PyTorch's generator of each process.

    Raises:
        ValueError: a setting of another task, or data that do not go with the model.
    """

    def __init__(self, config: TrainingConfig, model: PretrainedModel, world: World):
        if config.task not in (None, GENERATE):
            raise ValueError(f"task must be {GENERATE} for {type(model).__name__}, a generator; got {config.task!r}")
        for name in RESTORATION_FIELDS:
            if not config.is_default(name):
                raise ValueError(f"{name} must be left out for task {GENERATE}; got {getattr(config, name)}")
        shape = model.config
        self.config, self.num_classes = config, shape.num_classes
        self.shape = shape.in_channels, shape.sample_size, shape.sample_size
        self.patch_sizes = (shape.sample_size,) * len(config.stages)
        self.diffusion = GaussianDiffusion()
        self.data = self._open("data", config.data)
        self.images: TrainingData | CachedLatents
        if isinstance(self.data, ClassImages):
            self.data.preload(max(1, config.workers))
            self.images = TrainingData([self.data])
        else:
            self.images = self.data
        self.dataset(shape.sample_size, 1)[0]  # what cannot be had must show now
        if world.rank == 0:
            self.images.warn_of_skipped()
        self.validation = None
        if config.val is not None:
            held_out = self._open("val", config.val, self.data.classes if self.num_classes else None)
            self.validation = GenerationValidation(self, held_out)

    def dataset(self, patch_size: int, batch_size: int) -> Dataset:
        return NoisingExamples(self.data, len(self.diffusion.schedule), flip=self.config.flip, seed=self.config.seed)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        return self.losses(model, batch).mean()

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """The loss of each example of a batch, (B,)."""
        x_0, labels, timestep, noise = batch
        x_t = self.diffusion.q_sample(x_0, timestep, noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            output = model(x_t, timestep, labels if self.num_classes else None)
        return self.diffusion.hybrid_loss(output, x_0, x_t, noise, timestep)

    def _open(self, name: str, folder: Path | tuple[Path, ...], classes: tuple[str, ...] | None = None) -> Labelled:
        if isinstance(folder, tuple):
            raise ValueError(f"{name} must be one folder for task {GENERATE}; got {', '.join(map(str, folder))}")
        data = open_labelled(folder, self.shape, classes)
        if self.num_classes and len(data.classes) > self.num_classes:
            raise ValueError(
                f"num_classes of the model must be at least the {len(data.classes)} of {name}; got {self.num_classes}"
            )
        return data


class GenerationValidation:
    """The loss of 128 examples of held-out data, not mirrored, with timesteps from first to last and fixed noise.

    Where there are fewer images they come again, with other timesteps.
    """

    def __init__(self, objective: Generation, data: Labelled):
        self.objective = objective
        steps = len(objective.diffusion.schedule)
        places = [number * len(data) // _VALIDATED for number in range(_VALIDATED)]
        # A stride that shares no factor with the count, so that images of one class get timesteps far apart.
        times = [(number * 37 % _VALIDATED) * (steps - 1) // (_VALIDATED - 1) for number in range(_VALIDATED)]
        self.examples = []
        for number, (place, timestep) in enumerate(zip(places, times, strict=True)):
            x_0, label = data.example(place)
            generator = torch.Generator().manual_seed(number)
            self.examples.append((x_0, label, timestep, torch.randn(x_0.shape, generator=generator)))

    def measured(self, model: nn.Module, device: torch.device) -> dict[str, str]:
        """A column of the log with its value."""
        return {"val_loss": f"{self.loss(model, device):.6f}"}

    @torch.inference_mode()
    def loss(self, model: nn.Module, device: torch.device) -> float:
        """The mean of the examples, with all labels."""
        model.eval()
        total = 0.0
        for start in range(0, _VALIDATED, _AT_ONCE):
            batch = [each.to(device) for each in default_collate(self.examples[start : start + _AT_ONCE])]
            total += self.objective.losses(model, batch).sum().item()
        return total / _VALIDATED
