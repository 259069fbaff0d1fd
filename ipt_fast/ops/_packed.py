"""Operators with packed weights, for what cannot change any more; they cast as autocast does."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _cpu
from ._operator import OPERATORS
from ._select import reason_against


class PackedOperator:
    """An operator with packed weights, of a layer with ``norm`` or of a branch; it casts its input as autocast does."""

    def __init__(
        self, name: str, arguments: Mapping[str, Any], dtype: torch.dtype, norm: nn.Module | None = None
    ) -> None:
        self.norm, self._dtype = norm, dtype
        self._run, self._block, self._inner = _cpu.pack(OPERATORS[name], arguments, dtype)

    def takes(self, x: Tensor) -> bool:
        """Whether the operator would compute in this dtype now: a model may switch autocast in its forward."""
        return computing_dtype(x) is self._dtype

    def __call__(self, x: Tensor, *of_images: Tensor | None, **by_name: Tensor | None) -> Tensor:
        """The operator of ``x``; others, in order or by name, are those of `_cpu.OF_IMAGES` that this call brings."""
        if x.dtype is self._inner:
            return self._run(x, self._block, *of_images, **by_name)
        return self._run(x.to(self._dtype).to(self._inner), self._block, *of_images, **by_name).to(self._dtype)


def kernels_take(name: str, channels: int, arguments: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether the CPU's kernels run the operator ``name`` on maps of so many channels with these other arguments."""
    call = inspect.signature(OPERATORS[name].function).bind(torch.empty(1, channels, 1, 1, dtype=dtype), **arguments)
    call.apply_defaults()
    return reason_against(OPERATORS[name], "cpu", tuple(call.arguments.values())) is None


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of ``x`` on the CPU are computed now."""
    autocast = torch.is_autocast_enabled("cpu") and x.dtype is not torch.float64
    return torch.get_autocast_dtype("cpu") if autocast else x.dtype
