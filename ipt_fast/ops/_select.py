"""Choosing a backend: an ordered list per device, and one predicate per kernel that answers None or a reason."""

import contextlib
import contextvars
import os

ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("cpu", "triton", "cuda", "reference")
POLICIES = ("auto", *BACKENDS)

_policy = contextvars.ContextVar("ipt_fast_backend", default=None)


def _checked(policy, source):
    if policy not in POLICIES:
        raise ValueError(f"{source} must be one of {', '.join(POLICIES)}; got {policy!r}")
    return policy


def policy():
    """The backend asked for in this context: ``use_backend``, else IPT_FAST_BACKEND, else "auto"."""
    chosen = _policy.get()
    return chosen if chosen is not None else _checked(os.environ.get("IPT_FAST_BACKEND", "auto"), "IPT_FAST_BACKEND")


class use_backend(contextlib.ContextDecorator):  # noqa: N801, it reads as a statement, as torch.no_grad does
    """Demand one backend inside a ``with`` block, in this thread (and asyncio task) only.

    Args:
        name: "auto" takes the fastest backend that can run each operator, as far as that has been measured;
            "reference" (plain PyTorch), "cpu" (C++), "triton" and "cuda" are demanded: an operator that cannot run on
            it raises with the reason.

    A backward runs on the backend of its forward, wherever it is called. Under ``torch.compile`` forward and backward
    each choose when they run: put the block around both calls.

    Raises:
        ValueError: ``name`` is none of these.
    """

    def __init__(self, name):
        self._name = _checked(name, "backend")
        self._tokens = []

    def __enter__(self):
        self._tokens.append(_policy.set(self._name))

    def __exit__(self, *exception):
        _policy.reset(self._tokens.pop())


def reason_against(operator, backend, args):
    """Why ``backend`` cannot run ``operator`` on ``args`` (None: in general), or None if it can."""
    kernel = operator.kernels.get(backend)
    if kernel is None:
        return f"this version has no {backend} kernel for {operator.name}"
    return kernel.check(args)


def choose(operator, args, demanded=None):
    """The name of the backend that runs ``operator`` on ``args``.

    Raises:
        RuntimeError: a backend other than "auto" was demanded and cannot run; the message gives the reason.
    """
    wanted = demanded or policy()
    if wanted != "auto":
        if reason := reason_against(operator, wanted, args):
            raise RuntimeError(f"{operator.name}: backend {wanted!r} cannot run: {reason}")
        return wanted
    for backend in ORDER.get(args[0].device.type, ("reference",)):
        if reason_against(operator, backend, args) is None and operator.kernels[backend].automatic(args):
            return backend
    raise AssertionError("the reference runs everywhere")
