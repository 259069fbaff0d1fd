"""Whether an accelerated module computes what the plain one does: both against float64, by the library's error rule."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

# As for the operators themselves: at most twice the error that plain PyTorch makes in this dtype, which is the largest
# one of several draws, and a few units in the last place are always allowed.
TIMES = 2
DRAWS = 6
FLOOR = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}
# Of a whole model, in which the errors of tens of modules add up: 1e-5 in float32.
FLOOR_OF_WHOLE = {torch.float64: 80, torch.float32: 80, torch.bfloat16: 16, torch.float16: 16}
Call = tuple[Any, Any]  # args and kwargs


class Exact:
    """A plain model in float64: what it returns, and what its modules are called with, on an example.

    Args:
        model: it is copied.
        example: what it takes.
        plain: function that gives a module its own class back.

    Raises:
        ValueError: the model cannot be copied or does not run in float64.
    """

    def __init__(self, model: nn.Module, example: Tensor, plain: Callable[[nn.Module], None]) -> None:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("verify must be False for a model on the meta device, which has no weights yet")
        try:
            self.model = copy.deepcopy(model).double()
            for module in self.model.modules():
                plain(module)
        except Exception as error:
            raise ValueError(
                "the model cannot be copied, as the check against float64 needs: accelerate it before it is wrapped, "
                "or with verify=False"
            ) from error
        self.dtype = example.dtype
        self.call: Call = ((example,), {})

    def calls(self, paths: Iterable[str]) -> dict[str, Call]:
        """{path: (args, kwargs)}, rounded to the model's dtype, of the first call of each module."""
        found: dict[str, Call] = {}

        def keep(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in found:
                found[path] = _cast((args, kwargs), self.dtype)

        modules = {path: self.model.get_submodule(path) for path in paths}
        handles = [
            module.register_forward_pre_hook(functools.partial(keep, path), with_kwargs=True)
            for path, module in modules.items()
        ]
        try:
            with _InFloat64():
                self.model(self.call[0][0].double())
        except Exception as error:
            raise ValueError(
                "the model does not run on the example in float64, with which all is compared: "
                f"give another example, or verify=False ({type(error).__name__}: {error})"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return found


class Verification:
    """The error of a module on the arguments of one call, and what is allowed.

    Args:
        plain: function of the arguments, which calls the module as it was.
        exact: the plain module in float64.
        call: arguments, in the dtype that counts.
        floor: units in the last place that are always allowed, by dtype.

    Raises:
        ValueError: the arguments are such that not even the exact result is finite.
    """

    def __init__(
        self, plain: Callable[..., Any], exact: nn.Module, call: Call, floor: dict[torch.dtype, int] = FLOOR
    ) -> None:
        self._plain, self._exact, self._call = plain, exact, call
        self.dtype = next(t.dtype for t in _tensors(call) if t.is_floating_point())
        self._truth = self._run(exact, call, torch.float64)
        if not all(bool(tensor.isfinite().all()) for tensor in _tensors(self._truth)):
            raise ValueError("the example leads to results that are not finite even in float64")
        self._instead: nn.Module | None = None
        self._draws = self._errors_of_plain()
        self.allowed = floor[self.dtype] * torch.finfo(self.dtype).eps

    def error(self, run: Callable[..., Any]) -> float:
        """The largest error of ``run(*args, **kwargs)``; as many draws are made as it needs to be allowed."""
        args, kwargs = copied(self._call)
        found = largest_error(run(*args, **kwargs), self._truth)
        while not found <= self.allowed and (drawn := next(self._draws, None)) is not None:
            self.allowed = max(self.allowed, TIMES * drawn)
        return found

    def _errors_of_plain(self) -> Iterator[float]:
        """The error of the plain module on the arguments, and on arguments that are a little smaller."""
        for draw in range(DRAWS):
            call = _map(self._call, functools.partial(_smaller, draw, self.dtype)) if draw else self._call
            truth = self._run(self._exact, call, torch.float64)
            found = float("inf") if self.dtype == torch.float64 else self._error_of(self._plain, call, truth)
            if not found < float("inf"):
                found = self._error_instead(call, truth)
            yield found if found < float("inf") else 0.0  # what fails everywhere allows nothing

    def _error_instead(self, call: Call, truth: Any) -> float:
        """What stands in for the error of the plain module where it fails in its dtype, or is the exact one itself.

        For 16 bits that of the plain module in float32 whose modules round what they return to as many digits: they
        overflow no more, nor mix dtypes. For float64 that in float32, in units in the last place.
        """
        if self._instead is None:
            self._instead = copy.deepcopy(self._exact).float()
            if self.dtype != torch.float64:
                for module in self._instead.modules():
                    module.register_forward_hook(functools.partial(_rounded, self.dtype))
        found = self._error_of(self._instead, _cast(call, torch.float32), truth)
        if self.dtype == torch.float64:
            return found * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return found

    def _error_of(self, module: Callable[..., Any], call: Call, truth: Any) -> float:
        args, kwargs = copied(call)
        try:
            return largest_error(module(*args, **kwargs), truth)
        except RuntimeError:  # a mixture of dtypes, or an operation that there is not in this one
            return float("inf")

    @staticmethod
    def _run(module: nn.Module, call: Call, dtype: torch.dtype) -> Any:
        args, kwargs = _cast(call, dtype)
        with _InFloat64():
            return module(*args, **kwargs)


class _InFloat64(TorchFunctionMode):
    """Masks, coordinates and kernels that a model makes in float32 are float64 where they meet what is.

    They are not made in float64: a model may keep them.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = args, kwargs or {}
        dtypes, name = {tensor.dtype for tensor in _tensors(call)}, getattr(function, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if not in_place and {torch.float32, torch.float64} <= dtypes:
            call = _map(call, lambda t: t.double() if t.dtype == torch.float32 else t)
        args, kwargs = call
        return function(*args, **kwargs)


def _rounded(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    """The output of a module with the digits of ``dtype``, in the range of its own."""

    def rounded(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        mantissa, exponent = t.frexp()
        units = 2 / torch.finfo(dtype).eps  # the mantissa is between a half and 1
        return ((mantissa * units).round() / units).ldexp(exponent)

    return _map(output, rounded)


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


def copied(call: Call) -> Call:
    """The same arguments in tensors of their own: a module may write into them."""
    return _map(call, torch.Tensor.clone)


def _cast(call: Call, dtype: torch.dtype) -> Call:
    """Copies of the arguments, those of floating point in ``dtype``."""
    return _map(call, lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return _pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
