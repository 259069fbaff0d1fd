"""A quick PSNR during training; benchmark figures come from ``ipt_fast.evaluation``."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.dataset import ImageFolder as ImageFolder  # an "as" marks names that are kept for older imports
from ..data.degradations import add_gaussian_noise as add_gaussian_noise
from ..data.degradations import degrade, find_task, target_of
from ..data.stream import ImageStream, PairStream, TrainingData
from ..models._pretrained import PretrainedModel as PretrainedModel
from ..models.contract import describe

_MAX_IMAGES = 12
_CROP = 128


class Validation:
    """Centre crops of at most 12 images spread over a source, as inputs of every task.

    What a degradation draws is fixed by the number of the image. Images that cannot be used are named and skipped.

    Args:
        source: clean images, which are degraded, or pairs, which are taken as they are.
        tasks: names as :func:`ipt_fast.data.degradations.degrade` takes them; of pairs the first one counts.
        size: sides of the input that the model takes; None takes crops of at most 128 x 128.
        sigma: range of noise levels of tasks without one.

    Raises:
        ValueError: no image can be used for a task.
    """

    def __init__(
        self,
        source: ImageStream | PairStream,
        tasks: Iterable[str],
        size: int | None = None,
        sigma: tuple[float, float] = (25.0, 25.0),
    ):
        self.examples: list[tuple[str, Tensor, Tensor]] = []  # (task, input, target)
        for task in list(tasks)[: 1 if isinstance(source, PairStream) else None]:
            scale = find_task(task).scale if isinstance(source, ImageStream) else source.scale
            side = (size or scale) * scale if isinstance(source, ImageStream) else size or 1
            chosen = source.usable(side)
            if not chosen:
                raise ValueError(f"val must hold images of at least {side} pixels a side for {task}; got none")
            before = len(self.examples)
            for number in chosen[:: -(-len(chosen) // _MAX_IMAGES)]:
                if (images := source.take(number)) is not None:
                    generator = torch.Generator().manual_seed(number)
                    self.examples.append((task, *_example(images, task, scale, size or _CROP, generator, sigma)))
            if len(self.examples) == before:
                raise ValueError(f"val must hold images that can be read for {task}; got none")
        TrainingData([source]).warn_of_skipped()

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(input, target) of all examples."""
        return [(degraded, clean) for _, degraded, clean in self.examples]

    def measured(self, model: nn.Module, device: torch.device) -> dict[str, str]:
        """A column of the log with its value."""
        return {"psnr": f"{self.psnr(model, device):.3f}"}

    @torch.inference_mode()
    def psnr(self, model: nn.Module, device: torch.device) -> float:
        """Mean PSNR in dB over images and tasks, outputs clipped to [0, 1], all channels together."""
        model.eval()
        contract, results = describe(model), dict[str, list[float]]()
        for task, degraded, clean in self.examples:
            inputs = degraded.to(device).unsqueeze(0) * contract.value_range
            output = model(inputs, task) if contract.takes_task else model(inputs)
            error = (output[0].float() / contract.value_range).clamp(0, 1) - clean.to(device)
            results.setdefault(task, []).append(-10 * torch.log10(error.square().mean()).item())
        means = [sum(values) / len(values) for values in results.values()]
        return sum(means) / len(means)


class ValidationSet(Validation):
    """A folder of clean images with Gaussian noise of one level."""

    def __init__(self, folder: str | Path, channels: int, sigma: float):
        super().__init__(ImageStream(folder, 0, channels=channels), ["denoise"], sigma=(sigma, sigma))


class TaskValidation(Validation):
    """A folder of clean images for several tasks, {name: magnification}, of a model with inputs of one size."""

    def __init__(self, folder: str | Path, tasks: dict[str, int], size: int, sigma: tuple[float, float]):
        super().__init__(ImageStream(folder, 0), tasks, size, sigma)


def _example(
    images: tuple[Tensor, ...],
    task: str,
    scale: int,
    size: int,
    generator: torch.Generator,
    sigma: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    *inputs, target = images
    target = _centre_crop(target, size, scale)
    if inputs:
        return torch.cat([_centre_crop(image, size, 1) for image in inputs]), target
    target = target_of(target, task)
    return degrade(target, task, generator, sigma), target


def _centre_crop(image: Tensor, size: int, scale: int) -> Tensor:
    """Float in [0, 1], at most ``size`` squares of ``scale`` x ``scale`` pixels a side, at the same place of a pair."""
    height, width = (side // scale for side in image.shape[1:])
    top, left = max(0, (height - size) // 2) * scale, max(0, (width - size) // 2) * scale
    height, width = min(height, size) * scale, min(width, size) * scale
    return image[:, top : top + height, left : left + width].float() / torch.iinfo(image.dtype).max
