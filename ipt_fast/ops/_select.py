"""Choosing a backend: an ordered list per device, and one predicate per kernel that answers None or a reason."""

import contextlib
import contextvars
import functools
import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from .. import _extension

ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("cpu", "triton", "cuda", "reference")
POLICIES = ("auto", *BACKENDS)
F = TypeVar("F", bound=Callable[..., Any])

# The backends of the blocks around the running code, outermost first. A tuple, never changed, so that threads and
# tasks cannot disturb each other.
_blocks: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("ipt_fast_backends", default=())


def _checked(policy: Any, source: str) -> str:
    if policy not in POLICIES:
        raise ValueError(f"{source} must be one of {', '.join(POLICIES)}; got {policy!r}")
    return policy


def policy() -> str:
    """The backend asked for in this context: ``use_backend``, else IPT_FAST_BACKEND, else "auto"."""
    if blocks := _blocks.get():
        return blocks[-1]
    return _checked(os.environ.get("IPT_FAST_BACKEND", "auto"), "IPT_FAST_BACKEND")


def _outside_of_graphs(method: F) -> F:
    """What ``torch.compiler.disable`` would tell the compiler, without importing the compiler."""
    marked: Any = method
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "use_backend belongs around the call of a compiled function, not into it"
    return method


class use_backend:  # noqa: N801, it reads as a statement, as torch.no_grad does
    """Demand one backend inside a ``with`` block or a decorated function, in this thread (and asyncio task) only.

    Args:
        name: "auto" takes the fastest backend that can run each operator, as far as that has been measured;
            "reference" (plain PyTorch), "cpu" (C++), "triton" and "cuda" are demanded: an operator that cannot run on
            it raises with the reason.

    A backward runs on the backend of its forward, wherever it is called. What activation checkpointing computes again
    is a new forward: :func:`keep_backend` tells it where. Under ``torch.compile`` forward and backward each choose when
    they run: put the block around both calls.

    Decorated generators and coroutines are inside the block while they run, and outside while they are suspended.

    Raises:
        ValueError: ``name`` is none of these. TypeError: a class is decorated.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "backend")

    @_outside_of_graphs
    def __enter__(self) -> None:
        _blocks.set((*_blocks.get(), self._name))

    @_outside_of_graphs
    def __exit__(self, *exception: Any) -> None:
        _blocks.set(_blocks.get()[:-1])

    def __call__(self, function: F) -> F:
        if isinstance(function, staticmethod | classmethod):
            return type(function)(self(function.__func__))  # type: ignore[return-value]
        if inspect.isclass(function) or not callable(function):
            raise TypeError(f"use_backend: what it decorates must be a function or method; got {function!r}")
        # What is called: objects may have a __call__ of any kind.
        routine = inspect.isroutine(function) or isinstance(function, functools.partial)
        kind = function if routine else type(function).__call__
        if inspect.isasyncgenfunction(kind):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                inner = function(*args, **kwargs)
                step: Any
                step, value = inner.asend, None
                while True:
                    try:
                        item = await self._await_inside(step(value))
                    except StopAsyncIteration:
                        return
                    try:
                        step, value = inner.asend, (yield item)
                    except GeneratorExit:
                        await self._await_inside(inner.aclose())
                        raise
                    except BaseException as error:
                        step, value = inner.athrow, error

        elif inspect.iscoroutinefunction(kind):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                return await self._await_inside(function(*args, **kwargs))

        elif inspect.isgeneratorfunction(kind):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return (yield from self._run_inside(function(*args, **kwargs)))

        else:

            @_outside_of_graphs
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

        return cast(F, wrapper)

    def _run_inside(self, inner: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The steps of a generator (or of what ``await`` drives), each in the block, which is left in between."""
        step: Any
        step, value = inner.send, None
        while True:
            try:
                with self:
                    item = step(value)
            except StopIteration as stop:
                return stop.value
            try:
                step, value = inner.send, (yield item)
            except GeneratorExit:
                with self:
                    inner.close()
                raise
            except BaseException as error:
                step, value = inner.throw, error

    @types.coroutine
    def _await_inside(self, awaitable: Any) -> Generator[Any, Any, Any]:
        return (yield from self._run_inside(awaitable))


def keep_backend() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """``context_fn`` for activation checkpointing that computes again on the backend asked for now.

    ``torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=ipt_fast.keep_backend)``. With
    ``use_reentrant=True``, which takes no ``context_fn``, decorate what is checkpointed:
    ``checkpoint(use_backend("reference")(layer), x, use_reentrant=True)``.

    Returns:
        The contexts of the forward and of its repetition.
    """
    return contextlib.nullcontext(), use_backend(policy())


def reason_against(operator: Any, backend: str, args: Any) -> str | None:
    """Why ``backend`` cannot run ``operator`` on ``args`` (None: in general), or None if it can."""
    kernel = operator.kernels.get(backend)
    if kernel is None:
        return f"this version has no {backend} kernel for {operator.name}"
    return kernel.check(args)


def warn_without_kernels(device: str) -> None:
    """Warn, once in a process, where "auto" takes plain PyTorch for want of any compiled kernel for this device.

    Silent where the installation was asked for as plain PyTorch (IPT_FAST_PURE=1).
    """
    if reason := _extension.reason_for_plain(device):
        _warn_once(reason)


@functools.cache
def _warn_once(reason: str) -> None:
    text = f"ipt_fast runs as plain PyTorch here, several times slower than it could: {reason}"
    # The line that is shown is the caller's, outside of this package and of PyTorch.
    inside = tuple(str(Path(inspect.getfile(module)).parent) for module in (_extension, torch))
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def choose(operator: Any, args: Any, demanded: str | None = None) -> str:
    """The name of the backend that runs ``operator`` on ``args``.

    Raises:
        RuntimeError: a backend other than "auto" was demanded and cannot run; the message gives the reason.
    """
    wanted = demanded or policy()
    if wanted != "auto":
        if reason := reason_against(operator, wanted, args):
            raise RuntimeError(f"{operator.name}: backend {wanted!r} cannot run: {reason}")
        return wanted
    device = args[0].device.type
    for backend in ORDER.get(device, ("reference",)):
        kernel = operator.kernels.get(backend)
        if kernel is not None and kernel.check(args) is None and kernel.automatic(args):
            if backend == "reference":
                warn_without_kernels(device)
            return backend
    raise AssertionError("the reference runs everywhere")
