"""LPIPS: how unlike two images look, as distances between the features that a network for ImageNet has of them.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, eq. 1, version 0.1
with AlexNet, which is what tables of restoration mean. No weights ship; they are read from files.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu

from ..models import read_state_dict

SMALLEST_SIDE = 31  # of an image of which the last layers see a pixel
# (name in torchvision's AlexNet, outputs, inputs, kernel, stride, padding)
_CONVOLUTIONS = (
    ("features.0", 64, 3, 11, 4, 2),
    ("features.3", 192, 64, 5, 1, 2),
    ("features.6", 384, 192, 3, 1, 1),
    ("features.8", 256, 384, 3, 1, 1),
    ("features.10", 256, 256, 3, 1, 1),
)
_POOLED = ("features.3", "features.6")  # what gets its input through 3 x 3 max pooling of stride 2
_SHIFT = (-0.030, -0.088, -0.188)  # for images in [-1, 1]: ImageNet's mean and deviation on that scale
_SCALE = (0.458, 0.448, 0.450)
_SUFFIXES = (".pth", ".pt", ".safetensors")


class LPIPS(nn.Module):
    """The distance of two batches of images, 0 for equal ones.

    Args:
        state: the 10 tensors `features.{0,3,6,8,10}.{weight,bias}` of torchvision's AlexNet and the 5 heads
            `lin{0..4}.model.1.weight` (1, C, 1, 1) that its authors published; others are ignored.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for index, (name, outputs, inputs, kernel, _, _) in enumerate(_CONVOLUTIONS):
            shapes = {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}
            for key, shape in {**shapes, f"lin{index}.model.1.weight": (1, outputs, 1, 1)}.items():
                found = tuple(state[key].shape) if key in state else "none"
                if found != shape:
                    raise ValueError(f"weights of LPIPS must hold {key} of shape {shape}; got {found}")
                self.register_buffer(key.replace(".", "_"), state[key].float())
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(3, 1, 1))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """(B,) distances of (B, 3, H, W) floats in [0, 1], at least 31 pixels a side.

        Raises:
            ValueError: another shape.
        """
        if images.shape != others.shape or images.dim() != 4 or images.shape[1] != 3:
            shapes = f"{tuple(images.shape)} and {tuple(others.shape)}"
            raise ValueError(f"images must be (B, 3, H, W) and of one shape; got {shapes}")
        if min(images.shape[2:]) < SMALLEST_SIDE:
            least, size = f"{SMALLEST_SIDE}x{SMALLEST_SIDE}", f"{images.shape[2]}x{images.shape[3]}"
            raise ValueError(f"images must have at least {least} pixels for LPIPS; got {size}")
        distances = torch.zeros(len(images), device=images.device)
        for index, pair in enumerate(zip(self._features(images), self._features(others), strict=True)):
            first, second = (features / (features.norm(dim=1, keepdim=True) + 1e-10) for features in pair)
            head = self.get_buffer(f"lin{index}_model_1_weight")
            distances += conv2d((first - second) ** 2, head).mean((1, 2, 3))
        return distances

    def _features(self, images: Tensor) -> list[Tensor]:
        """After each of the five convolutions and its ReLU."""
        values, found = (2 * images - 1 - self.shift) / self.scale, []
        for name, _, _, _, stride, padding in _CONVOLUTIONS:
            if name in _POOLED:
                values = max_pool2d(values, 3, 2)
            weight, bias = (self.get_buffer(f"{name}.{kind}".replace(".", "_")) for kind in ("weight", "bias"))
            values = relu(conv2d(values, weight, bias, stride, padding))
            found.append(values)
        return found

    @torch.inference_mode()
    def compare(self, image: np.ndarray, other: np.ndarray) -> float:
        """The distance of two arrays (H, W, C) in [0, 1], clipped to it; C = 3, or 1 as three equal channels."""
        batches = []
        for each in (image, other):
            channels = torch.from_numpy(np.clip(each, 0, 1).astype(np.float32)).permute(2, 0, 1)[None]
            batches.append(channels.expand(-1, 3, -1, -1) if channels.shape[1] == 1 else channels)
        return float(self(*(batch.to(self.shift.device) for batch in batches)))


def load_lpips(paths: Sequence[str | os.PathLike[str]]) -> LPIPS:
    """LPIPS with the weights in some files, all files of weights of a folder included.

    Args:
        paths: of torchvision's AlexNet for ImageNet (`alexnet-owt-7be5be79.pth`, its `features.*`) and of the heads
            that the authors of LPIPS published (`weights/v0.1/alex.pth`, `lin*.model.1.weight`); or of one file that
            holds both. PyTorch or safetensors.

    Raises:
        ValueError: a file cannot be read, or the tensors are not all there.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_state_dict(file)
    return LPIPS(state)
