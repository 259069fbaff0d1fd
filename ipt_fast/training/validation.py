"""A quick PSNR during training; benchmark figures come from ``ipt_fast.evaluation``."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.dataset import ImageFolder
from ..data.degradations import add_gaussian_noise, degrade
from ..models._pretrained import PretrainedModel
from ..models.contract import describe

_MAX_IMAGES = 12
_CROP = 128


class ValidationSet:
    """Centre crops (at most 128×128) of at most 12 images spread over a folder, with fixed noise."""

    def __init__(self, folder: str | Path, channels: int, sigma: float):
        images = ImageFolder(folder, channels, memory_budget=0)
        chosen = range(0, len(images), -(-len(images) // _MAX_IMAGES))
        self.pairs = []
        for index in chosen:
            clean = _centre_crop(images[index]).float() / 255
            generator = torch.Generator().manual_seed(index)
            self.pairs.append((add_gaussian_noise(clean, sigma, generator), clean))

    @torch.inference_mode()
    def psnr(self, model: nn.Module, device: torch.device) -> float:
        """Mean PSNR in dB, outputs clipped to [0, 1], all channels together."""
        model.eval()
        white, total = describe(model).value_range, 0.0
        for noisy, clean in self.pairs:
            output = (model(noisy.to(device).unsqueeze(0) * white).float() / white).clamp(0, 1)
            total -= 10 * torch.log10((output - clean.to(device)).square().mean()).item()
        return total / len(self.pairs)


class TaskValidation:
    """Centre crops of at most 12 images spread over a folder as inputs of every task, with fixed noise and rain.

    Args:
        tasks: {name: magnification}.
        size: of the model's input.
        sigma: range of noise levels of a task without one.
    """

    def __init__(self, folder: str | Path, tasks: dict[str, int], size: int, sigma: tuple[float, float]):
        images = ImageFolder(folder, 3, memory_budget=0)
        self.tasks = []  # (name, inputs, targets)
        for name, scale in tasks.items():
            chosen = [i for i, sides in enumerate(images.sizes) if min(sides) >= scale * size]
            if not chosen:
                raise ValueError(
                    f"val must hold images of at least {scale * size} pixels a side for {name}; got none in {folder}"
                )
            chosen = chosen[:: -(-len(chosen) // _MAX_IMAGES)]
            clean = [_centre_crop(images[i], scale * size).float() / 255 for i in chosen]
            inputs = [
                degrade(image, name, torch.Generator().manual_seed(i), sigma)
                for i, image in zip(chosen, clean, strict=True)
            ]
            self.tasks.append((name, torch.stack(inputs), torch.stack(clean)))

    @torch.inference_mode()
    def psnr(self, model: PretrainedModel, device: torch.device) -> float:
        """Mean PSNR in dB over images and tasks, outputs clipped to [0, 1], all channels together."""
        model.eval()
        top, means = model.contract.value_range, []
        for name, inputs, targets in self.tasks:
            output = (model(inputs.to(device) * top, name).float() / top).clamp(0, 1)
            error = (output - targets.to(device)).square().flatten(1).mean(1)
            means.append(-10 * torch.log10(error).mean().item())
        return sum(means) / len(means)


def _centre_crop(image: Tensor, size: int = _CROP) -> Tensor:
    _, height, width = image.shape
    top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
    return image[:, top : top + size, left : left + size]
