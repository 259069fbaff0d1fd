"""What the backends' predicates share: the dtypes and GPUs that kernels take, and limits of one operator by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .._precision import DTYPES
from ._operator import Arguments, Operator

LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU

_TAKEN = frozenset(DTYPES.values())
Limits = Callable[..., str | None]


def dtype_error(dtype: torch.dtype, kernels: str) -> str | None:
    """None if ``kernels`` ("the C++ kernels") take tensors of ``dtype``, else the reason."""
    if dtype in _TAKEN:
        return None
    *names, last = DTYPES
    return f"{kernels} take {', '.join(names)} and {last}; the tensors are {dtype}"


def capability_error(gpu: str, capability: tuple[int, int], kernels: str) -> str | None:
    """None if ``kernels`` run on this GPU, given by its name, else the reason."""
    if capability >= LEAST_CAPABILITY:
        return None
    need, have = ("{}.{}".format(*pair) for pair in (LEAST_CAPABILITY, capability))
    return f"{kernels} need compute capability {need} or later; {gpu} has {have}"


def by_name(operator: Operator, limits: Limits | None) -> Callable[[Arguments], str | None]:
    """``limits``, a function of those arguments of ``operator`` that its parameters name, as a function of them all.

    It answers None or why the kernels do not take the arguments.
    """
    if limits is None:
        return lambda args: None
    named = [(name, operator.arguments.index(name)) for name in inspect.signature(limits).parameters]
    return lambda args: limits(**{name: args[index] for name, index in named})


class Lacking:
    """The arguments of an operator, of which kernels do not have some.

    Args:
        operator: the `Operator`.
        neutral: {argument that the kernels lack: the value at which they do not need it, None, True or False}.
    """

    def __init__(self, operator: Operator, neutral: Mapping[str, Any]) -> None:
        self._neutral = dict(neutral)
        self.arguments = tuple(name for name in operator.arguments if name not in self._neutral)
        self.tensors = tuple(name for name in operator.tensors if name not in self._neutral)
        self._kept = [name not in self._neutral for name in operator.arguments]
        self._all_tensors = operator.tensors
        declared = zip(self._kept, operator.schema.split(", "), strict=True)
        self.schema = ", ".join(argument for kept, argument in declared if kept)
        self._names = operator.arguments

    def reason(self, args: Arguments) -> str | None:
        """None, or which argument the kernels would need."""
        for name, value in zip(self._names, args, strict=True):
            if name in self._neutral and value is not self._neutral[name]:
                return f"these kernels take {name}={self._neutral[name]} only"
        return None

    def strip(self, args: Arguments) -> Sequence[Any]:
        return [value for kept, value in zip(self._kept, args, strict=True) if kept]

    def fill(self, gradients: Sequence[Any]) -> list[Any]:
        """Gradients of the kernels' tensors as those of all tensors; None for those they lack."""
        known = dict(zip(self.tensors, gradients, strict=True))
        return [known.get(name) for name in self._all_tensors]
