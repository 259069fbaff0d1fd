"""What a rule is, and what rules have in common."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to compute certain modules of other people on the operators.

    A module is known by the name of its class and by its attributes, never by where the class was imported from: every
    project has its own copy.

    Args:
        name: unique, for reports and pickles.
        classes: names of classes.
        misfit: function of a module of such a class: None if it has the shape that ``forward`` expects, else how it
            differs.
        parts: function of the module: the submodules that ``forward`` reads parameters of, or leaves out, instead of
            calling them. Where one of them is changed (hooks, adapters, another forward), the module's own forward
            runs.
        forward: function of the module and of what its own forward takes; returns what that returns.
        inactive: function of the module: why its own forward has to run in its present state, or None. For what depends
            on training mode, as dropout does.
        silent: modules of these classes that do not fit, or that another rule computes, are no news.
        arguments: names of what the class's own forward takes, or None for any; read when a module is accelerated.

    ``misfit``, ``inactive`` and ``parts`` are asked at every call, so that whatever is done to a module later counts.
    """

    name: str
    classes: tuple[str, ...]
    misfit: Callable[[Any], str | None]
    parts: Callable[[Any], Iterable[nn.Module]]
    forward: Callable[..., Any]
    inactive: Callable[[Any], str | None] = lambda module: None
    arguments: tuple[str, ...] | None = None
    silent: bool = False


class Misfit(Exception):
    """How a module differs from what a rule expects."""


def reason(check: Callable[[Any], None]) -> Callable[[Any], str | None]:
    """``check``, which raises :class:`Misfit`, as a function that returns the reason; a lacking attribute is one."""

    def misfit(module: Any) -> str | None:
        try:
            check(module)
        except Misfit as found:
            return str(found)
        except AttributeError as error:
            return f"it has no attribute {error.name}"
        return None

    return misfit


def expect(condition: bool, otherwise: str) -> None:
    """Raise :class:`Misfit` with ``otherwise`` unless the condition holds."""
    if not condition:
        raise Misfit(otherwise)


def expect_type(module: Any, name: str, *types: type) -> None:
    """The submodule ``name`` must be of exactly one of these classes."""
    found = type(getattr(module, name))
    expect(found in types, f"its {name} is a {found.__name__}")


def inside(module: nn.Module) -> list[nn.Module]:
    """Everything in a module: the parts of a rule that calls none of it."""
    return [part for part in module.modules() if part is not module]


# (B, N, C) tokens and maps. A map of tokens is channels-last, so neither way copies anything.


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def pointwise(linear: nn.Linear) -> Tensor:
    """The weight (out, in) of a linear layer as that of a 1 x 1 convolution."""
    return linear.weight[..., None, None]


def drops(*modules: nn.Module | None) -> str | None:
    """Why modules of dropout or stochastic depth change a result now, or None."""
    for module in modules:
        rate = getattr(module, "drop_prob", None) or getattr(module, "p", None) or 0.0
        if module is not None and module.training and rate > 0:
            return f"{type(module).__name__} is active in training"
    return None
