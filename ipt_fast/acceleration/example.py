"""An input on which a model is verified."""

from typing import Any

import torch
from torch import Tensor, nn

LEAST = 64  # pixels of a side


def example_of(model: nn.Module, descriptor: Any = None) -> Tensor:
    """A seeded image in [0, 1] of the smallest size from 64 x 64 on that the model takes, in its dtype, on its device.

    Args:
        model: its first convolution tells the number of channels.
        descriptor: of spandrel, which tells channels and sizes.

    Raises:
        ValueError: there is no convolution, or no parameter at all.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("example must be given: the model has no parameters")
    channels, size = _channels(model), LEAST
    if descriptor is not None:
        channels, needs = descriptor.input_channels, descriptor.size_requirements
        multiple = needs.multiple_of or 1
        size = -(-max(LEAST, needs.minimum or 0) // multiple) * multiple
    image = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    return image.to(parameter.device, parameter.dtype)


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError("example must be given: the model has no convolution that tells the channels of its input")
