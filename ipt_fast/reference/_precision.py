"""The precision in which a reference runs."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, cast

import torch
from torch import Tensor

P = ParamSpec("P")


class Reference(Protocol[P]):
    """A reference, and its formula."""

    formula: Callable[P, Tensor]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor: ...


def in_full_precision(formula: Callable[P, Tensor]) -> Reference[P]:
    """Run ``formula`` in float32 (float64 for float64 input) and round once, to the dtype of its first argument.

    The undecorated formula stays at ``.formula``: it computes every intermediate in the dtype it is given and is what
    tests and benchmarks call the baseline.
    """

    @functools.wraps(formula)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first: Any = next(iter((*args, *kwargs.values())))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32

        def widen(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) else value

        out = formula(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})
        return out.to(first.dtype)

    reference = cast(Reference[P], wrapper)
    reference.formula = formula
    return reference
