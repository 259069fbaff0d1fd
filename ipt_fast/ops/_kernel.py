"""One backend's implementation of an operator, and the states of PyTorch's dispatcher in which it runs."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]  # of a call, in the order of the schema

_KEYS, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
AUTOCAST_KEYS = _KeySet(_KEYS.AutocastCPU) | _KeySet(_KEYS.AutocastCUDA)
# With it excluded, tensors that a kernel makes as views of its own memory leave as tensors in their own right.
VIEW_KEYS = _KeySet(_KEYS.ADInplaceOrView)
# What the dispatcher looks at beside the tensors and autocast, without and within inference mode. Modes, transforms,
# traces and fake tensors add keys of their own.
_USUAL_KEYS = {keys.raw_repr() for keys in (_KeySet(_KEYS.BackendSelect) | VIEW_KEYS, _KeySet(_KEYS.BackendSelect))}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an operator.

    ``check(args)`` answers None or the reason it cannot run (``args`` None: on any arguments); ``forward(*args)``
    returns the output, or a tuple of all outputs; ``backward(*grads, *args, *kept)`` returns one gradient for each of
    `Operator.differentiated` (anything for an absent argument); ``automatic(args)`` tells whether "auto" takes it where
    it can run.
    """

    check: Callable[[Arguments | None], str | None]
    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    backward: Callable[..., Sequence[Tensor | None]]
    automatic: Callable[[Arguments], bool] = lambda args: True


def unwatched() -> bool:
    """Whether calls do nothing here but compute: nobody traces, transforms or records them, for gradients or otherwise.

    Autocast may be on.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._len_torch_function_stack():
        return False
    return torch._C._dispatch_tls_local_include_set().raw_repr() in _USUAL_KEYS


def as_channels_last(x: Tensor) -> Tensor:
    """``x`` with exactly the strides of a channels-last map of its shape, which also settles axes of size 1."""
    batch, channels, height, width = x.shape
    if x.stride() == (height * width * channels, 1, width * channels, channels):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


def autograd_recording() -> contextlib.AbstractContextManager[Any]:
    """Make autograd record inside a kernel, where the dispatcher has switched it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (_KEYS.AutogradCPU, _KEYS.AutogradCUDA, _KEYS.AutogradOther, _KEYS.AutogradFunctionality):
        excluded = excluded - _KeySet(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
