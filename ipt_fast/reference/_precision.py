"""The precision in which a reference runs."""

import functools

import torch


def in_full_precision(formula):
    """Run ``formula`` in float32 (float64 for float64 input) and round once, to the dtype of its first argument.

    The undecorated formula stays at ``.formula``: it computes every intermediate in the dtype it is given and is what
    tests and benchmarks call the baseline.
    """

    @functools.wraps(formula)
    def reference(*args, **kwargs):
        first = next(iter((*args, *kwargs.values())))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32

        def widen(value):
            return value.to(dtype) if isinstance(value, torch.Tensor) else value

        out = formula(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})
        return out.to(first.dtype)

    reference.formula = formula
    return reference
