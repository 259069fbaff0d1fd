"""What the backends' predicates share: the dtypes and GPUs that kernels take, and limits of one operator by name."""

import inspect
from collections.abc import Callable

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
