"""Where a loss or a gradient that is not finite comes from: told once training has failed, at no cost before.

The forward and the backward pass are done again with hooks on the modules. Modules with hooks are not fused, so that
each is seen by itself. Where all is finite then, they are done once more with hooks around fused layers only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import World
from .parallel import own_part, transformer_layers


def first_fault(loss: nn.Module, model: nn.Module, batches: Sequence[Sequence[Tensor]], world: World) -> str:
    """Which module of ``model`` is the first to give values or gradients that are not finite, and how, in a sentence.

    Values are followed in the order of the forward pass, gradients in that of the backward pass.

    Args:
        loss: a module that gives the loss of a batch by calling ``model``. All processes call this together, each with
            its own batches.
    """
    inside = tuple(f"{path}." for path in transformer_layers(model))
    paths = {path for path, _ in model.named_modules()}
    for seen, note in ((paths, ""), ({p for p in paths if not p.startswith(inside)}, " (as a fused layer)")):
        repetitions = [_Repetition(model, seen) for _ in batches]
        found = [repetition.faults(loss, batch) for repetition, batch in zip(repetitions, batches, strict=True)]
        # Values first: of sharded weights all processes get the gradients that one has spoilt.
        for said in zip(*found, strict=True):
            if fault := world.first(next(filter(None, said), None)):
                return fault + note
    return "when the step was repeated all values and gradients were finite"


@dataclass
class _Call:
    """One call of a module: whether its input and output and, after the backward pass, their gradients are finite."""

    name: str
    path: str
    input_finite: bool
    output_finite: bool
    input_gradients: list[bool] = field(default_factory=list)
    output_gradients: list[bool] = field(default_factory=list)


class _Repetition:
    """A step of a model with hooks on the modules at ``paths``."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.model = model
        self.modules = [(path, module) for path, module in model.named_modules() if path in paths]
        self.calls: list[_Call] = []  # in the order in which they end: a module's parts come before it
        self.inputs: dict[str, tuple[bool, list[Tensor]]] = {}
        self.recording = False

    def faults(self, loss: nn.Module, batch: Sequence[Tensor]) -> tuple[str | None, str | None]:
        """What is wrong first in values, and in gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None
        with self._hooks():
            self.recording = True
            value = loss(batch)
            self.recording = False  # checkpointed layers are called again in the backward pass
            value.backward()
        return self._in_values(batch, value.detach()), self._in_gradients()

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for path, module in self.modules:
            handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.recording:
                tensors = list(_tensors((args, kwargs)))
                self.inputs[path] = _finite(tensors), tensors  # now: modules may work in place

        return record

    def _after(self, path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not self.recording:
                return
            input_finite, inputs = self.inputs.pop(path)
            outputs = list(_tensors(output))
            name = f"{path or 'the model'} ({type(module).__name__})"
            call = _Call(name, path, input_finite, _finite(outputs))
            self.calls.append(call)
            _follow(inputs, call.input_gradients)
            _follow(outputs, call.output_gradients)

        return record

    def _in_values(self, batch: Sequence[Tensor], loss: Tensor) -> str | None:
        bad = [call for call in self.calls if not call.output_finite]
        # One that was given what is not finite is not at fault: a function between modules is, of the one around them.
        call = next((call for call in bad if call.input_finite), bad[0] if bad else None)
        if call is None and torch.isfinite(loss):
            return None
        if call is None:
            return f"the loss is {loss.item()}, though all that the modules give is finite"
        if not _finite(_tensors(batch)):
            return f"the batch is not finite, and so the output of {call.name} is not"
        given = f"its input {'was' if call.input_finite else 'was not'} finite"
        for name, parameter in self.model.named_parameters():
            if _belongs(name, call.path) and not _finite([parameter]):
                return f"parameters of {call.name} are not finite: {name}; {given}"
        return f"output of {call.name} is not finite; {given}"

    def _in_gradients(self) -> str | None:
        bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not _finite([p.grad])]
        faults = [
            call
            for call in self.calls
            if call.output_gradients
            and all(call.output_gradients)
            and (not all(call.input_gradients) or any(_belongs(name, call.path) for name in bad))
        ]
        # A module holds those inside it; the last in the forward pass is the first in the backward pass.
        innermost = [c for c in faults if not any(o is not c and _belongs(o.path, c.path) for o in faults)]
        if innermost:
            call = innermost[-1]
            of = next((f": {name}" for name in bad if _belongs(name, call.path)), "")
            return f"gradients of {call.name} are not finite{of}; its output and the gradient of that were finite"
        if bad:
            return f"gradients are not finite from that of the loss on; the first parameter is {bad[0]}"
        return None


def _belongs(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(own_part(tensor.detach())).all()) for tensor in tensors)


def _follow(tensors: Iterable[Tensor], flags: list[bool]) -> None:
    """Append to ``flags`` whether each tensor's gradient is finite, once it has one."""
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: flags.append(_finite([gradient])))
