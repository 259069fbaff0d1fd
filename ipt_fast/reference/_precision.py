"""The precision in which a reference runs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Reference(Protocol[P, R]):
    """A reference, and its formula."""

    @property
    def formula(self) -> Callable[P, R]: ...

    @property
    def everything(self) -> Callable[P, Any]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def in_full_precision(formula: Callable[P, R]) -> Reference[P, R]:
    """Run ``formula`` in float32 (float64 for float64 input) and round once, to the dtype of its first argument.

    The undecorated formula stays at ``.formula``: it computes every intermediate in the dtype it is given and is what
    tests and benchmarks call the baseline.
    """
    return in_full_precision_like(next(iter(inspect.signature(formula).parameters)))(formula)


def in_full_precision_like(*names: str, kept: int = 0) -> Callable[[Callable[P, Any]], Reference[P, Any]]:
    """As :func:`in_full_precision`, of a formula with several results.

    Args:
        names: for each result the argument whose dtype it is rounded to. One of them in float64 makes all float64.
        kept: how many of the results, the last ones, are not the operator's outputs but kept for its backward. Only
            ``.everything`` returns them.
    """
    outputs = len(names) - kept

    def public(results: Any) -> Any:
        return results if kept == 0 else results[0] if outputs == 1 else results[:outputs]

    def decorate(formula: Callable[P, Any]) -> Reference[P, Any]:
        parameters = tuple(inspect.signature(formula).parameters)

        def everything(*args: P.args, **kwargs: P.kwargs) -> Any:
            values: dict[str, Any] = {**dict(zip(parameters, args, strict=False)), **kwargs}
            dtypes = [values[name].dtype for name in names]
            dtype = torch.float64 if torch.float64 in dtypes else torch.float32

            def widen(value: Any) -> Any:
                return value.to(dtype) if isinstance(value, torch.Tensor) else value

            results = formula(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})
            if len(names) == 1:
                return results.to(dtypes[0])
            return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))

        @functools.wraps(formula)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
            return public(everything(*args, **kwargs))

        @functools.wraps(formula)
        def plain(*args: P.args, **kwargs: P.kwargs) -> Any:
            return public(formula(*args, **kwargs))

        marked: Any = wrapper
        marked.formula = formula if kept == 0 else plain
        marked.everything = everything
        return cast(Reference[P, Any], marked)

    return decorate
