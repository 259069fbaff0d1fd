"""What a model tells those that run or train it, so that none of them has to look into models.

Only here is a module asked for attributes that it need not have.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

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


def describe(model: nn.Module) -> Contract:
    """The contract of any module.

    A wrapper that hands on attributes, as that of ``torch.compile`` does, has the contract of what it wraps.

    Returns:
        The module's attribute ``contract``. Of a module without one, what its ``config`` (``in_channels``,
        ``image_size``, ``value_range``, ``width``), its methods ``scale`` and ``reparameterize`` and the signature of
        its forward say.
    """
    # An error inside a class's own contract must not pass for a module without one.
    contract = model.contract if hasattr(type(model), "contract") else getattr(model, "contract", None)
    return contract if isinstance(contract, Contract) else _contract_of_foreign(model)


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
