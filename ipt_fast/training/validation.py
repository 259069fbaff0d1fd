"""A quick PSNR during training; benchmark figures come from ``ipt_fast.evaluation``."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.dataset import ImageFolder
from ..data.degradations import add_gaussian_noise

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
        total = 0.0
        for noisy, clean in self.pairs:
            output = model(noisy.to(device).unsqueeze(0)).float().clamp(0, 1)
            total -= 10 * torch.log10((output - clean.to(device)).square().mean()).item()
        return total / len(self.pairs)


def _centre_crop(image: Tensor) -> Tensor:
    _, height, width = image.shape
    top, left = max(0, (height - _CROP) // 2), max(0, (width - _CROP) // 2)
    return image[:, top : top + _CROP, left : left + _CROP]
