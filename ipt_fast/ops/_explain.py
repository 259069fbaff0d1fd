"""Telling which backend runs an operator, and why the others do not."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ._operator import OPERATORS
from ._select import BACKENDS, reason_against


class Fusable(nn.Module):
    """A module that runs parts of itself as fused operators, unless it is ``plain``, or calls modules that do."""

    plain = False  # True in the twins that `to_reference` makes

    def reasons_against_fusing(self) -> dict[str, str | None]:
        """{part: None if one operator computes it, else why its modules are called}, of parts that it fuses itself."""
        return {}


def explain(op: Callable | str | nn.Module | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Which backends can run an operator, or which parts of a model run as fused operators.

    Args:
        op: an operator of :mod:`ipt_fast.ops` or its name; None for all of them. Or a module.
        args, kwargs: the arguments of one call; without any, the answer is for this installation in general.

    Returns:
        For a module ``{path of a part: None if one operator stands in for it, else why its modules are called}``.
        Else ``{operator: {backend: None if it can run, else the reason}}``. A call takes the first that can run of
        "cpu", "reference" on the CPU and of "cuda", "triton", "reference" on NVIDIA GPUs, unless ``use_backend``
        demands one.

    Raises:
        ValueError, TypeError: no operator of that name, or arguments that it does not take.
    """
    if isinstance(op, nn.Module):
        if args or kwargs:
            raise TypeError(f"explain: args and kwargs must be absent beside a module; got {len(args) + len(kwargs)}")
        return _explain_module(op)
    names: list[Any] = list(OPERATORS) if op is None else [getattr(op, "__name__", op)]
    if not isinstance(names[0], str) or names[0] not in OPERATORS:
        raise ValueError(f"op must be one of {', '.join(OPERATORS)}; got {op!r}")
    if op is None and (args or kwargs):
        raise TypeError(f"explain: args and kwargs must be absent where op is None; got {len(args) + len(kwargs)}")
    table = {}
    for name in names:
        operator = OPERATORS[name]
        call = None
        if args or kwargs:
            bound = inspect.signature(operator.function).bind(*args, **kwargs)
            bound.apply_defaults()
            operator.check_tensors(*(bound.arguments[name] for name in operator.tensors))
            call = tuple(bound.arguments.values())
        table[name] = {backend: reason_against(operator, backend, call) for backend in BACKENDS}
    return table


def _explain_module(model: nn.Module) -> dict[str, str | None]:
    return {
        f"{path}.{part}" if path else part: reason
        for path, module in model.named_modules()
        if isinstance(module, Fusable)
        for part, reason in module.reasons_against_fusing().items()
    }
