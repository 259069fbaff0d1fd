"""Telling which backend runs an operator, and why the others do not."""

import inspect

from ._operator import OPERATORS
from ._select import BACKENDS, reason_against


def explain(op=None, *args, **kwargs):
    """Which backends can run an operator.

    Args:
        op: an operator of :mod:`ipt_fast.ops` or its name; None for all of them.
        args, kwargs: the arguments of one call; without any, the answer is for this installation in general.

    Returns:
        ``{operator: {backend: None if it can run, else the reason}}``. A call takes the first that can run of "cpu",
        "reference" on the CPU and of "cuda", "triton", "reference" on NVIDIA GPUs, unless ``use_backend`` demands one.

    Raises:
        ValueError, TypeError: no operator of that name, or arguments that it does not take.
    """
    names = list(OPERATORS) if op is None else [getattr(op, "__name__", op)]
    if not isinstance(names[0], str) or names[0] not in OPERATORS:
        raise ValueError(f"op must be one of {', '.join(OPERATORS)}; got {op!r}")
    if op is None and (args or kwargs):
        raise TypeError("explain: arguments need the operator they are for")
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
