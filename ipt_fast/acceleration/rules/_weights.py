"""What depends on weights alone: computed in every call, but once in a frozen model, whose weights cannot change."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._kernel import unwatched
from ...ops._packed import PackedOperator, computing_dtype, kernels_take


def remembering(module: nn.Module) -> None:
    """Let a module, whose weights nobody changes any more, remember what is computed of them."""
    module.__dict__["remembered"] = {}


def _remembered(module: nn.Module) -> dict[Any, Any] | None:
    values = module.__dict__.get("remembered")
    return values if values is not None and unwatched() else None


def remembers(module: nn.Module) -> bool:
    """Whether functions :func:`of_weights` of this module are computed once, as far as they are now."""
    return _remembered(module) is not None


_MOST_KEYS = 64


def _remember(values: dict[Any, Any], key: Any, compute: Callable[[], Any]) -> Any:
    """The value of the key. Threads that ask at once may each compute it, alike; the first is kept.

    Keys are few, unless they hold a tensor that is another in every call: then all is forgotten now and then.
    """
    try:
        return values[key]
    except KeyError:
        if len(values) >= _MOST_KEYS:
            values.clear()
        with torch.inference_mode(False), torch.no_grad():  # of use outside of inference mode, too
            return values.setdefault(key, compute())


def of_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function whose value depends on nothing but the weights of a module and constants.

    It takes the module, which remembers the value in a frozen model, and others or constants. Nobody may write to it.
    """

    @functools.wraps(function)
    def value(module: nn.Module, *others: Any) -> Any:
        values = _remembered(module)
        if values is None:
            return function(module, *others)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return _remember(values, (function, others, autocast), lambda: function(module, *others))

    return value


def run_layer(
    operator: Callable[..., Tensor],
    x: Tensor,
    arguments: Callable[..., Mapping[str, Any]],
    module: nn.Module,
    *others: Any,
    gate: Tensor | None = None,
) -> Tensor:
    """operator(x, gate=gate, \\*\\*arguments(module, \\*others)) of weights alone, packed once in a frozen model."""
    values = _remembered(module)
    if values is not None and x.is_cpu:
        dtype = computing_dtype(x)
        key = operator, arguments, others, dtype
        pack = functools.partial(_packed, operator.__name__, x.shape[1], arguments, module, *others, dtype=dtype)
        if packed := _remember(values, key, pack):
            return packed(x, gate=gate)
    return operator(x, gate=gate, **arguments(module, *others))


def _packed(
    name: str, channels: int, arguments: Callable[..., Mapping[str, Any]], *of: Any, dtype: torch.dtype
) -> PackedOperator | None:
    given = arguments(*of)
    return PackedOperator(name, given, dtype) if kernels_take(name, channels, given, dtype) else None
