"""Whether an accelerated module computes what the plain one does: both against float64, by the library's error rule."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

# As for the operators themselves: at most twice the error that plain PyTorch makes in this dtype, which is the largest
# one of several draws, and a few units in the last place are always allowed.
TIMES = 2
DRAWS = 6
FLOOR = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}


class Verification:
    """What plain modules return for certain arguments, exactly.

    Args:
        module: the module, before it is accelerated; it is copied in float64.
        args, kwargs: of the call.
        plain: function of arguments that calls the module as it was, whatever it is then.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, plain: Callable[..., Any]) -> None:
        self._plain, self._call = plain, (args, kwargs)
        self._wide = copy.deepcopy(module).double()
        self.dtype = next(t.dtype for t in _tensors(self._call) if t.is_floating_point())
        self._truth = self._exact(self._call)
        self._draws = self._errors_of_plain()
        self.allowed = FLOOR.get(self.dtype, 8) * torch.finfo(self.dtype).eps

    def error(self, run: Callable[..., Any]) -> float:
        """The largest error of ``run(*args, **kwargs)``; as many draws are made as it needs to be allowed."""
        args, kwargs = self._call
        found = largest_error(run(*args, **kwargs), self._truth)
        while not found <= self.allowed and (drawn := next(self._draws, None)) is not None:
            self.allowed = max(self.allowed, TIMES * drawn)
        return found

    def _exact(self, call: Any) -> Any:
        args, kwargs = _map(call, lambda t: t.double() if t.is_floating_point() else t)
        return self._wide(*args, **kwargs)

    def _errors_of_plain(self) -> Iterator[float]:
        """The error of the plain module on the arguments, and on arguments that are a little smaller."""
        for draw in range(DRAWS):
            call = self._call if draw == 0 else _map(self._call, functools.partial(_smaller, draw, self.dtype))
            args, kwargs = call
            found = largest_error(self._plain(*args, **kwargs), self._exact(call))
            yield found if found < float("inf") else 0.0  # what overflows allows nothing


def _smaller(draw: int, dtype: torch.dtype, t: Tensor) -> Tensor:
    """``t`` by up to two units in the last place of ``dtype`` nearer to zero."""
    if not t.is_floating_point():
        return t
    by = torch.rand(t.shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64).to(t.device)
    return (t.double() * (1 - 2 * torch.finfo(dtype).eps * by)).to(t.dtype)


def largest_error(found: Any, truth: Any) -> float:
    """max |found - truth| / max |truth| over all tensors; infinite where one is not finite or of another shape."""
    pairs = list(zip(_tensors(found), _tensors(truth), strict=False))
    if len(_tensors(found)) != len(_tensors(truth)) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    errors = []
    for value, exact in pairs:
        difference, scale = (value.double() - exact).abs().max().item(), exact.abs().max().item()
        errors.append(float("inf") if difference != difference else difference / scale if scale else difference)
    return max(errors, default=0.0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return _pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
