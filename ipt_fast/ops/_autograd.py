"""Autograd of an operator: what a forward keeps, and the call of the backward operator."""

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import _select
from ._kernel import Arguments

if TYPE_CHECKING:
    from ._operator import Operator

_last = threading.local()  # .run: the output of this thread's last forward, weakly, and the backend that it ran on


def remember(output: Tensor, backend: str) -> None:
    """Called at the end of every forward that a kernel runs."""
    _last.run = weakref.ref(output), backend


def _backend_of(operator: "Operator", output: Tensor, inputs: Arguments) -> str | None:
    """The backend that computed ``output``; None in a traced graph, which outlives its forward: it chooses again."""
    if type(output) is not torch.Tensor:
        return None
    known, backend = getattr(_last, "run", (lambda: None, ""))
    # Selective checkpointing takes an output from its store, without a forward.
    return backend if known() is output else _select.choose(operator, inputs)


class _Outline(NamedTuple):
    """What stays of an argument whose values no backward reads."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """Zeros of this shape, all of them one number in memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


def register(operator: "Operator", library: torch.library.Library) -> None:
    """Differentiate ``ipt_fast::<name>`` by ``ipt_fast::<name>_backward``, and that one not at all."""
    n_outputs = len(operator.outputs)
    x, branch, total = operator.residual or ("", "", "")

    def setup_context(ctx: Any, inputs: Arguments, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.backend = _backend_of(operator, outputs[0], inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[n_outputs:])
        results = dict(zip((*operator.outputs, *operator.kept), outputs, strict=True))
        values = dict(zip(operator.arguments, inputs, strict=True))
        if x:
            values[x] = results[total]
        for name in operator.unread:
            if values[name] is not None:
                values[name] = _Outline(values[name].shape, values[name].dtype, values[name].device)
        held = [*values.values(), *(results[name] for name in operator.kept if name != total)]
        ctx.save_for_backward(*(v for v in held if isinstance(v, torch.Tensor)))
        ctx.others = [None if isinstance(v, torch.Tensor) else (v,) for v in held]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        held = [next(saved) if other is None else other[0] for other in ctx.others]
        held = [value.zeros() if isinstance(value, _Outline) else value for value in held]
        values = dict(zip(operator.arguments, held, strict=False))
        found = operator.call_backward(grads[:n_outputs], values, held[len(values) :], ctx.backend)
        by_name = dict(zip(operator.differentiated, found, strict=True))
        if branch:
            by_name[branch] = by_name[x].to(values[branch].dtype)
        return tuple(by_name[name] if isinstance(values[name], torch.Tensor) else None for name in operator.arguments)

    def no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"ipt_fast.ops.{operator.name} cannot be differentiated twice")

    name = f"ipt_fast::{operator.name}"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"{name}_backward", no_second_derivative, lib=library)
