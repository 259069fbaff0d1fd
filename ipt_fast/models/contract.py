"""What a model tells those that run or train it, so that none of them has to look into models.

Only here is a module asked for attributes that it need not have.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._precision import DTYPES

# Of a U-shaped model, for each pixel of its input and each channel of its ``width``. Measured as peak resident memory
# (VmHWM) less that after an image of 64 x 64 (VmRSS) of merged IPT-V2, fp32, CPU: tiny 243 at 256 x 256 and 246 at
# 512 x 512, small 204 and 183, base 229 at 256 x 256; autocast to bf16 took as much. The C++ kernels took 39 for small
# at 3840 x 2160.
BYTES_PER_PIXEL_AND_CHANNEL = 250
BYTES_WITH_FUSED_LAYERS = 50


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a forward pass takes for each pixel of its input, and the same with every layer on C++ kernels."""

    per_pixel: int
    per_pixel_fused: int

    @classmethod
    def of_width(cls, width: int) -> "Memory":
        """Of a U-shaped model with ``width`` channels at its first level."""
        return cls(BYTES_PER_PIXEL_AND_CHANNEL * width, BYTES_WITH_FUSED_LAYERS * width)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which heights and widths a model takes, in pixels.

    Args:
        minimum: of both.
        multiple_of: a divisor of both.
        square: they are equal.
    """

    minimum: int = 1
    multiple_of: int = 1
    square: bool = False

    def __post_init__(self) -> None:
        for name in ("minimum", "multiple_of"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int; got {value!r}")

    def containing(self, height: int, width: int) -> tuple[int, int]:
        """The smallest size that the model takes and that is nowhere less."""
        height, width = (-(-max(side, self.minimum) // self.multiple_of) * self.multiple_of for side in (height, width))
        return (max(height, width),) * 2 if self.square else (height, width)


def _same_size(task: str | int | None) -> int:
    return 1


def magnifies(factor: int) -> Callable[[str | int | None], int]:
    """The ``scale`` of a model that enlarges by one factor, whatever it is asked to do; it can be pickled."""
    return functools.partial(_by_factor, factor)


def _by_factor(factor: int, task: str | int | None) -> int:
    return factor


def _nothing_to_merge() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a model takes, gives and can do. The defaults are those of a module that tells nothing about itself.

    A model, of ours or not, carries it as its attribute ``contract``; :func:`describe` returns it.

    Args:
        in_channels: of the images it takes; None takes any number.
        out_channels: of the images it returns; None returns any number.
        image_size: side of its square input in pixels; None takes any size.
        sizes: which sizes it takes where it takes more than one; images of others are padded.
        whole: it sees images as wholes, so that where nothing else is asked for they are not cut into tiles.
        dtypes: in which it may run; where one is chosen for it, it is none but these.
        value_range: the value of white, 0 is black.
        tasks: names of what it can do, in the order of their numbers; empty where it does one thing.
        takes_task: whether its forward has an argument ``task``, a name or a number.
        scale: how many times larger than the input the output of a task is; a task that the model does not have raises
            a ValueError.
        memory: what a forward pass takes; None where it is not known.
        reparameterize: merges the model's branches, in place.
        objective: what it is trained for, a key of ``ipt_fast.training.objectives.OBJECTIVES``.
        generates: it makes images from noise, step by step, where other models restore a given one at once.
    """

    in_channels: int | None = None
    out_channels: int | None = None
    image_size: int | None = None
    value_range: float = 1.0
    tasks: tuple[str, ...] = ()
    takes_task: bool = False
    scale: Callable[[str | int | None], int] = _same_size
    memory: Memory | None = None
    reparameterize: Callable[[], None] = _nothing_to_merge
    objective: str = "denoising"
    generates: bool = False
    sizes: Sizes = Sizes()
    whole: bool = False
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())


def describe(model: Any) -> Contract:
    """The contract of any module, or of a descriptor of spandrel.

    A wrapper that hands on attributes, as that of ``torch.compile`` does, has the contract of what it wraps.

    Returns:
        The module's attribute ``contract``. Of a module without one, what its ``config`` (``in_channels``,
        ``image_size``, ``value_range``, ``width``), its methods ``scale`` and ``reparameterize`` and the signature of
        its forward say; of a descriptor what it says.

    Raises:
        ValueError: a descriptor's model takes more than an image.
    """
    if is_descriptor(model):
        return _contract_of_descriptor(model)
    # An error inside a class's own contract must not pass for a module without one.
    contract = model.contract if hasattr(type(model), "contract") else getattr(model, "contract", None)
    return contract if isinstance(contract, Contract) else _contract_of_foreign(model)


def is_descriptor(model: Any) -> bool:
    """Whether this is no module but a descriptor of spandrel, which has one."""
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module)


def describe_restoring(model: nn.Module) -> Contract:
    """The contract of a model that restores images.

    Raises:
        ValueError: it generates them.
    """
    contract = describe(model)
    if contract.generates:
        raise ValueError("model must restore images; got one that generates them (`ipt-fast sample`)")
    return contract


def attached_config(model: nn.Module) -> Any:
    """The attribute ``config`` of any module; None of one without."""
    return getattr(model, "config", None)


def _contract_of_descriptor(descriptor: Any) -> Contract:
    """Its contract, without the numbers that spandrel does not have, such as memory."""
    if descriptor.purpose == "Inpainting":
        raise ValueError(
            f"model must restore an image by itself; got one of {descriptor.architecture.name}, which needs a mask"
        )
    needs, half = descriptor.size_requirements, (descriptor.supports_bfloat16, descriptor.supports_half)
    return Contract(
        in_channels=descriptor.input_channels,
        out_channels=descriptor.output_channels,
        scale=magnifies(descriptor.scale),
        sizes=Sizes(max(1, needs.minimum), needs.multiple_of, needs.square),
        whole=descriptor.tiling.name == "INTERNAL",
        dtypes=(torch.float32, *(d for d, safe in zip((torch.bfloat16, torch.float16), half, strict=True) if safe)),
    )


def _contract_of_foreign(model: nn.Module) -> Contract:
    config = attached_config(model)
    found: dict[str, Any] = {
        name: getattr(config, name) for name in ("in_channels", "image_size", "value_range") if hasattr(config, name)
    }
    for name in ("scale", "reparameterize"):
        if callable(method := getattr(model, name, None)):
            found[name] = method
    takes_task = hasattr(model, "task_index") or _has_argument(model.forward, "task")
    width = getattr(config, "width", None)
    return Contract(takes_task=takes_task, memory=None if width is None else Memory.of_width(width), **found)


def _has_argument(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled functions have no signature that Python can read
        return False
