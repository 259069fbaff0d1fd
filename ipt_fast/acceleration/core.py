"""accelerate(): modules of other people's models get a forward on the operators, in place, verified and undoable.

A module stays the object it is, with its parameters, buffers, hooks and children: only its class becomes a subclass of
its own, with another forward. So a state dict, a move, a copy, an adapter or a wrapper is that of the plain module.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..modules import _fusion
from .example import example_of
from .half import raise_flags, restoring
from .report import Report, Row
from .rules import RULES, Rule, rule_named
from .verify import Verification


def accelerate(model: Any, *, verify: bool = True, example: Tensor | None = None, time: bool = False) -> Report:
    """Let the modules of a restoration model that rules know run on the operators, in place.

    Parameters, state dict, hooks and copies stay those of the plain model: only classes change. Where a part of an
    accelerated module is changed later (hooks, LoRA, another forward), or dropout is active, its plain forward runs.

    Args:
        model: a module, or a descriptor of spandrel, whose flags for 16 bit are raised where that is safe now
            (:mod:`ipt_fast.acceleration.half`).
        verify: run the example through the plain and the accelerated model, module by module and whole, and compare
            both with float64: an error may be twice that of the plain module. Else nothing is run.
        example: what the model takes; by default a seeded image of the smallest size from 64 x 64 on that it allows.
        time: also measure seconds of a call of each module and of the whole, before and after; needs ``verify``.

    Returns:
        A :class:`Report`: printed, a table of the modules; ``undo()`` takes all back.

    Raises:
        TypeError: ``model`` is no module and holds none. ValueError: a module's error is above the rule; the message
            names it, and the model is as it was.
    """
    descriptor, module = (None, model) if isinstance(model, nn.Module) else (model, getattr(model, "model", None))
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a descriptor of spandrel; got {type(model).__name__}")
    if time and not verify:
        raise ValueError("time must be False where verify is")
    rows, found = _find(module)
    whole = Row("", type(module).__name__)
    undo = functools.partial(_undo, [found_module for _, found_module, _ in found])
    if not verify or not found:
        for _, part, rule in found:
            _swap(part, rule)
        return Report(rows, whole, undo)
    example = example_of(module, descriptor) if example is None else example
    try:
        with _evaluating(module), torch.no_grad():
            _swap_verified(module, example, rows, whole, found, time)
            flags = raise_flags(descriptor, module, example, rows)
    except BaseException:
        undo()
        raise
    return Report(rows, whole, restoring(flags, descriptor, undo))


class Accelerated(_fusion.Fusable):
    """A module whose forward is that of a rule where nobody has changed its parts, and else that of its class."""

    rule: Rule
    plain_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if reason_against(self) is None:
            return self.rule.forward(self, *args, **kwargs)
        return self.plain_class.forward(self, *args, **kwargs)

    def reasons_against_fusing(self) -> dict[str, str | None]:
        return {self.rule.name: reason_against(self)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.plain_class, self.rule.name), self.__getstate__()  # type: ignore[attr-defined]


def reason_against(module: Accelerated) -> str | None:
    """Why the module's own forward has to run, or None."""
    if reason := _fusion.global_hooks() or module.rule.inactive(module):
        return reason
    for part in module.rule.parts(module):
        if reason := _fusion.changed(part):
            return f"{type(part).__name__}: {reason}"
    return None


@functools.cache
def accelerated_class(plain: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """The subclass of a module's class with the forward of a rule."""
    names = dict(rule=rule, plain_class=plain, __module__=plain.__module__, __qualname__=plain.__qualname__)
    return type(plain.__name__, (Accelerated, plain), {**names, "__doc__": plain.__doc__})


def _restored(plain: type[nn.Module], rule: str) -> nn.Module:
    cls = accelerated_class(plain, rule_named(rule))
    return cls.__new__(cls)


def _match(module: nn.Module) -> tuple[Rule | None, str | None]:
    """(the rule for a module or None, why there is none although a rule has the name of its class)."""
    reason = None
    for rule in RULES:
        if type(module).__name__ in rule.classes and (reason := rule.misfit(module)) is None:
            return rule, None
    return None, reason


def _find(model: nn.Module) -> tuple[list[Row], list[tuple[Row, nn.Module, Rule]]]:
    """Rows of the modules whose names rules know, and those of them that fit."""
    rows, found = [], []
    for path, module in model.named_modules():
        rule, reason = _match(module)
        if rule is not None or reason is not None:
            rows.append(Row(path, type(module).__name__, rule and rule.name, reason))
        if rule is not None:
            found.append((rows[-1], module, rule))
    return rows, found


def _swap(module: nn.Module, rule: Rule) -> None:
    for cls in (type(module), *(type(part) for part in rule.parts(module))):
        _fusion.remember(cls)
    module.__class__ = accelerated_class(type(module), rule)


def _undo(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, Accelerated):
            module.__class__ = module.plain_class


def _swap_verified(
    model: nn.Module,
    example: Tensor,
    rows: list[Row],
    whole: Row,
    found: list[tuple[Row, nn.Module, Rule]],
    time: bool,
) -> None:
    modules = [module for _, module, _ in found]
    of_whole = Verification(model, (example,), {}, _as_plain(model, modules))
    calls = _record(model, example, modules)
    if time:
        whole.before = _seconds(model, (example,), {})
    for row, module, rule in found:
        if module not in calls:
            row.rule, row.reason = None, "the example does not reach it"
            continue
        args, kwargs = calls.pop(module)
        check = Verification(module, args, kwargs, _as_plain(module, [module]))
        if time:
            row.before = _seconds(module, args, kwargs)
        _swap(module, rule)
        _verify(row, check, module)
        if time:
            row.after = _seconds(module, args, kwargs)
    _verify(whole, of_whole, model)
    if time:
        whole.after = _seconds(model, (example,), {})


def _record(model: nn.Module, example: Tensor, modules: list[nn.Module]) -> dict[nn.Module, tuple[Any, Any]]:
    """{module: (args, kwargs)} of the first call of each module while the model runs on the example."""
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(module, _pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs)))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _verify(row: Row, check: Verification, module: nn.Module) -> None:
    try:
        row.error = check.error(module)
    except Exception as error:
        raise ValueError(f"{row.path or 'the model'} ({row.kind}) does not run by the rule {row.rule}") from error
    row.allowed = check.allowed
    if not row.error <= row.allowed:
        raise ValueError(
            f"{row.path or 'the model'} ({row.kind}) has an error of {row.error:.1e} on the operators; "
            f"the error rule allows {row.allowed:.1e}"
        )


def _as_plain(module: nn.Module, accelerated: list[nn.Module]) -> Callable[..., Any]:
    """A function that calls ``module`` while the accelerated modules have their own classes."""

    def run(*args: Any, **kwargs: Any) -> Any:
        classes = [part.__class__ for part in accelerated]
        _undo(accelerated)
        try:
            return module(*args, **kwargs)
        finally:
            for part, cls in zip(accelerated, classes, strict=True):
                part.__class__ = cls

    return run


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _seconds(module: nn.Module, args: Any, kwargs: Any) -> float:
    """The median of three calls, after one."""

    def once() -> float:
        start = perf_counter()
        module(*args, **kwargs)
        return perf_counter() - start

    once()
    return statistics.median(once() for _ in range(3))
