"""The class of an accelerated module: a subclass of its own, with the forward of a rule.

Wrappers that work by classes are left where they are: FSDP2's ``fully_shard`` and parametrisations make a subclass, and
whichever came first, the accelerated class lies beneath and the plain one beneath that.
"""

import functools
import sys
from typing import Any

import torch
import torch.fx
from torch import nn

from ..modules import _fusion
from .rules import Rule, rule_named


class Accelerated(_fusion.Fusable):
    """A module whose forward is that of a rule where nobody has changed its parts, and else that of its class."""

    rule: Rule
    plain_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        symbolic = any(isinstance(argument, torch.fx.Proxy) for argument in args)  # it has no shape to decide by
        if not symbolic and reason_against(self) is None:
            return self.rule.forward(self, *args, **kwargs)
        return self.plain_class.forward(self, *args, **kwargs)

    def reasons_against_fusing(self) -> dict[str, str | None]:
        return {self.rule.name: reason_against(self)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not accelerated_class(self.plain_class, self.rule):  # a wrapper's, which knows what to do
            return super().__reduce_ex__(protocol)
        return _restored, (self.plain_class, self.rule.name), self.__getstate__()  # type: ignore[attr-defined]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        remember_parts(self, self.rule)


class Settled(Accelerated):
    """An accelerated module in a frozen model: nobody can change it any more, so that its parts are not asked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.rule.forward(self, *args, **kwargs)


def reason_against(module: Accelerated) -> str | None:
    """Why the module's own forward has to run, or None."""
    if module.plain:
        return "it is plain"
    if reason := _fusion.global_hooks() or _fusion.replaced(module.plain_class):
        return reason
    if reason := module.rule.misfit(module) or module.rule.inactive(module):
        return reason
    for part in module.rule.parts(module):
        if reason := _fusion.changed(part, others=True):
            return f"{type(part).__name__}: {reason}"
    return None


_classes: dict[tuple[type[nn.Module], Rule], type[Accelerated]] = {}


def accelerated_class(plain: type[nn.Module], rule: Rule) -> type[Accelerated]:
    """The one subclass of a module's class with the forward of a rule."""
    if (plain, rule) not in _classes:
        names = dict(rule=rule, plain_class=plain, __module__=plain.__module__, __qualname__=plain.__qualname__)
        cls = type(plain.__name__, (Accelerated, plain), {**names, "__doc__": plain.__doc__})
        for known in (plain, cls):
            _fusion.remember(known)
        _classes[plain, rule] = cls
    return _classes[plain, rule]


@functools.cache
def settled_class(accelerated: type[Accelerated]) -> type[Settled]:
    """The class of a module of this class in a frozen model."""
    names = {"__module__": accelerated.__module__, "__qualname__": accelerated.__qualname__}
    return type(accelerated.__name__, (Settled, accelerated), names)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or that of which FSDP2 made its class."""
    cls, fsdp = type(module), sys.modules.get("torch.distributed.fsdp")
    sharded = fsdp is not None and issubclass(cls, fsdp.FSDPModule)
    return cls.__bases__[-1] if sharded else cls


def swap(module: nn.Module, rule: Rule) -> None:
    """Let a module run by a rule that fits it."""
    remember_parts(module, rule)
    plain = plain_class(module)
    module.__class__ = _exchanged(type(module), plain, accelerated_class(plain, rule))


def unswap(module: nn.Module) -> None:
    """Give a module its own class back, if it is accelerated."""
    if isinstance(module, Accelerated):
        accelerated = accelerated_class(module.plain_class, module.rule)
        module.__class__ = _exchanged(type(module), accelerated, module.plain_class)


def remember_parts(module: nn.Module, rule: Rule) -> None:
    for part in rule.parts(module):
        _fusion.remember(type(part))


_exchanges: dict[tuple[type, type, type], type] = {}


def _exchanged(cls: type, old: type, new: type) -> type:
    """``cls``, or what wrappers made of ``old``, made of ``new``; there and back it is the class that it was."""
    if cls is old:
        return new
    if not issubclass(cls, old):
        return cls
    if (cls, old, new) not in _exchanges:
        bases = tuple(_exchanged(base, old, new) for base in cls.__bases__)
        names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        made: type = type(cls)(cls.__name__, bases, names)  # type: ignore[misc]
        _exchanges[cls, old, new], _exchanges[made, new, old] = made, cls
    return _exchanges[cls, old, new]


def _restored(plain: type[nn.Module], rule: str) -> nn.Module:
    cls = accelerated_class(plain, rule_named(rule))
    return cls.__new__(cls)
