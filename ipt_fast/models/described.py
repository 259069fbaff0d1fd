"""Descriptors of spandrel, which tell what a model takes, as modules that carry a contract."""

from typing import Any

from torch import Tensor, nn

from .contract import describe, is_descriptor


class Described(nn.Module):
    """The model of a descriptor, called as the descriptor calls it.

    Shape: (B, C, H, W) -> (B, C', s H, s W) with sides that its contract allows, values nominally in [0, 1]; where the
    descriptor clips its output, this does not.

    Args:
        descriptor: of spandrel; it shares its module. The contract is what it says now.

    Raises:
        ValueError: its model takes more than an image.
    """

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.contract = describe(descriptor)
        self.model = descriptor.model
        self._call = descriptor._call_fn  # how spandrel calls it has no public name without padding and clipping

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self.model, x)


def as_module(model: Any) -> nn.Module:
    """A module, as it is, or a descriptor of spandrel as one.

    Raises:
        TypeError: it is neither. ValueError: a descriptor's model takes more than an image.
    """
    if is_descriptor(model):
        return Described(model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must be a torch.nn.Module, as create_model makes, or a descriptor of spandrel; "
            f"got {type(model).__name__}"
        )
    return model
