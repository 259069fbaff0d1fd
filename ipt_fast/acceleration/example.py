"""An input on which a model is verified."""

from typing import Any

import torch
from torch import Tensor, nn

LEAST = 64  # pixels of a side


def examples_of(model: nn.Module, descriptor: Any = None) -> list[Tensor]:
    """Seeded images in [0, 1] of the smallest size from 64 x 64 on, in the model's dtype, on its device.

    Args:
        model: any module with parameters.
        descriptor: of spandrel, which tells channels and sizes. Without one there is an image for each number of
            channels that models have: three first, then what the first convolution takes.

    Raises:
        ValueError: the model has no parameters.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("example must be given: the model has no parameters")
    channels, size = [3, *_of_first_convolution(model), 1, 4, 6], LEAST
    if descriptor is not None:
        channels, needs = [descriptor.input_channels], descriptor.size_requirements
        multiple = needs.multiple_of or 1
        size = -(-max(LEAST, needs.minimum or 0) // multiple) * multiple
    generator = torch.Generator()
    return [
        torch.rand(1, count, size, size, generator=generator.manual_seed(0)).to(parameter.device, parameter.dtype)
        for count in dict.fromkeys(channels)
    ]


def _of_first_convolution(model: nn.Module) -> list[int]:
    return [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)][:1]


def checked(example: object, model: nn.Module) -> Tensor:
    """``example``, if the model can take it.

    Raises:
        TypeError: it is no floating-point tensor. ValueError: its dtype is not the model's, or it is not finite.
    """
    if not isinstance(example, Tensor) or not example.is_floating_point():
        found = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"example must be a floating-point tensor; got {found}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), example.dtype)
    if example.dtype != dtype:
        raise ValueError(f"example must be {dtype} as the model; got {example.dtype}")
    if not example.isfinite().all():
        raise ValueError("example must be finite")
    return example
