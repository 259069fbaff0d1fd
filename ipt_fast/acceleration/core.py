"""accelerate(): modules of other people's models get a forward on the operators, in place, verified and undoable.

A module stays the object it is, with its parameters, buffers, hooks and children: only its class becomes a subclass of
its own, with another forward. So a state dict, a move, a copy, an adapter or a wrapper is that of the plain module.
"""

import contextlib
import functools
import inspect
import statistics
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from .accelerated import Accelerated, plain_class, swap, unswap
from .example import checked, examples_of
from .half import raise_flags, restoring
from .report import Report, Row
from .rules import RULES, Rule
from .verify import FLOOR, FLOOR_OF_WHOLE, Call, Exact, Verification, copied


def accelerate(model: Any, *, verify: bool = True, example: Tensor | None = None, time: bool = False) -> Report:
    """Let the modules of a restoration model that rules know run on the operators, in place.

    Parameters, state dict, hooks and copies stay those of the plain model: only classes change. Where a part of an
    accelerated module is changed later (hooks, LoRA, another forward), or dropout is active, its plain forward runs.

    In float16 and bfloat16 the operators keep scores and statistics in float32, so that a model may become usable whose
    plain form overflows or mixes dtypes there. Shifted windows are cut at the border of the map, which is what a mask
    of -100 means as long as no score exceeds another by as much; where it does, the check refuses the module.

    Args:
        model: a module, or a descriptor of spandrel, whose flags for 16 bit are raised where that is safe now
            (:mod:`ipt_fast.acceleration.half`).
        verify: run the example through the plain model in float64, and then, module by module and whole, the
            accelerated one on what was recorded: its error may be twice that of the plain module in the same dtype.
            Where that fails in 16 bits, the error counts that it makes in float32 with the results of its modules
            rounded to 16. A few units in the last place are always allowed, of the whole model 80 in float32. False:
            nothing is run, and classes change unseen.
        example: what the model takes, in its dtype; by default a seeded image of the smallest size from 64 x 64 on
            that it allows, of three channels, or of as many as it runs on.
        time: also measure seconds of a call of each module and of the whole, before and after; needs ``verify``.

    Returns:
        A :class:`Report`: printed, a table of the modules; ``undo()`` takes all back.

    Raises:
        TypeError: ``model`` is no module and holds none, or ``example`` is no floating-point tensor.
        ValueError: a module's error is above the rule; the message names it, and the model is as it was. Or the model
            cannot be verified (it cannot be copied, is on the meta device or does not run in float64), which
            ``verify=False`` leaves out. Plain convolutions are left as they are instead, and the report says why.
    """
    descriptor, module = (None, model) if isinstance(model, nn.Module) else (model, getattr(model, "model", None))
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a descriptor of spandrel; got {type(model).__name__}")
    if time and not verify:
        raise ValueError("time must be False where verify is")
    rows, found = _find(module)
    whole = Row("", plain_class(module).__name__)
    undo = functools.partial(_undo, [part for _, part, _ in found])
    flags: dict[str, bool] = {}
    examples = [checked(example, module)] if verify and found and example is not None else None
    try:
        if verify and found:
            with _evaluating(module), torch.no_grad():
                taken = _swap_verified(module, examples or examples_of(module, descriptor), whole, found, time)
                silent = {row.path for row, _, rule in found if rule.silent}  # they make nothing safer
                flags = raise_flags(descriptor, module, taken, [row for row in rows if row.path not in silent])
        else:
            for _, part, rule in found:
                swap(part, rule)
    except BaseException as error:
        undo()
        if not isinstance(error, ValueError) or not all(rule.silent for _, _, rule in found):
            raise
        for row, _, _ in found:
            row.rule, row.reason = None, str(error)
    return Report(rows, whole, restoring(flags, descriptor, undo))


Found = tuple[Row, nn.Module, Rule]


def _find(model: nn.Module) -> tuple[list[Row], list[Found]]:
    """Rows of the modules whose names rules know, and those of them that fit and are not accelerated yet."""
    rows, found = [], []
    computed: set[nn.Module] = set()  # by the rule of a module around them
    for path, module in model.named_modules():
        kind = plain_class(module).__name__
        if isinstance(module, Accelerated):
            rows.append(Row(path, module.plain_class.__name__, module.rule.name, "accelerated before"))
            continue
        rule, reason = _match(module)
        if rule is not None and rule.silent and module in computed:
            continue
        if rule is not None or reason is not None:
            rows.append(Row(path, kind, rule.name if rule else None, reason))
        if rule is not None:
            found.append((rows[-1], module, rule))
            computed.update(rule.parts(module))
    return rows, found


def _match(module: nn.Module) -> tuple[Rule | None, str | None]:
    """(the rule for a module or None, why there is none although a rule has the name of its class)."""
    reasons, cls = [], plain_class(module)
    for rule in RULES:
        if cls.__name__ in rule.classes:
            taken = tuple(inspect.signature(cls.forward).parameters)[1:]
            if rule.arguments is not None and taken != rule.arguments:
                reasons.append(f"its forward takes {', '.join(taken)}")
            elif (reason := rule.misfit(module)) is not None:
                reasons += [] if rule.silent else [reason]
            else:
                return rule, None
    return None, "; ".join(dict.fromkeys(reasons)) or None


def _undo(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        unswap(module)


def _swap_verified(model: nn.Module, examples: Iterable[Tensor], whole: Row, found: list[Found], time: bool) -> Tensor:
    """Returns the example that the model was verified on."""
    exact, calls = _recorded(model, examples, [row.path for row, _, _ in found])
    if time:
        whole.before = _seconds(_as_plain(model), exact.call)
    # What is inside of another comes first, which then runs with it; but silent rules last, whose modules may be called
    # with the failure of another.
    for row, module, rule in sorted(reversed(found), key=lambda each: each[2].silent):
        if row.path not in calls:
            row.rule, row.reason = None, "the example does not reach it"
            continue
        call = calls.pop(row.path)
        if time:
            row.before = _seconds(_as_plain(module), call)
        swap(module, rule)
        try:
            _verify(row, module, exact.model.get_submodule(row.path), call)
        except ValueError as error:
            if not rule.silent:
                raise
            unswap(module)
            row.rule, row.reason = None, str(error)
            continue
        if time:
            row.after = _seconds(module, call)
    _verify(whole, model, exact.model, exact.call)
    if time:
        whole.after = _seconds(model, exact.call)
    return exact.call[0][0]


def _recorded(model: nn.Module, examples: Iterable[Tensor], paths: list[str]) -> tuple[Exact, dict[str, Call]]:
    """The model in float64 and the calls of its modules, on the first of the examples that it runs on."""
    errors = []
    for example in examples:
        exact = Exact(model, example, unswap)
        try:
            return exact, exact.calls(paths)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _verify(row: Row, module: nn.Module, exact: nn.Module, call: Call) -> None:
    what = f"{row.path or 'the model'} ({row.kind})" + (f" by the rule {row.rule!r}" if row.rule else "")
    try:
        check = Verification(_as_plain(module), exact, call, FLOOR_OF_WHOLE if row.rule is None else FLOOR)
        row.error = check.error(module)
    except Exception as error:
        raise ValueError(
            f"{what} cannot be verified, and the model is as it was: {type(error).__name__}: {error}"
        ) from error
    row.allowed = check.allowed
    if not row.error <= row.allowed:
        raise ValueError(
            f"{what} has an error of {row.error:.1e} on the operators, and the error rule allows {row.allowed:.1e}: "
            "the model is as it was"
        )


def _as_plain(module: nn.Module) -> Callable[..., Any]:
    """A function that calls ``module`` while it and all in it have their own classes."""

    def run(*args: Any, **kwargs: Any) -> Any:
        classes = [(part, type(part)) for part in module.modules() if isinstance(part, Accelerated)]
        _undo(part for part, _ in classes)
        try:
            return module(*args, **kwargs)
        finally:
            for part, cls in classes:
                part.__class__ = cls

    return run


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in, with the values that it had.

    A plain module may write to its own, as SPAN's merged convolutions do.
    """
    modes = {module: module.training for module in model.modules()}
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _seconds(run: Callable[..., Any], call: Call) -> float | None:
    """The median of three calls, after one; None where a plain module does not run in its dtype."""

    def once() -> float:
        args, kwargs = copied(call)
        start = perf_counter()
        run(*args, **kwargs)
        return perf_counter() - start

    try:
        once()
    except RuntimeError:
        return None
    return statistics.median(once() for _ in range(3))
