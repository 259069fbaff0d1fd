import dataclasses

import pytest

from ipt_fast.ops._operator import OPERATORS


@pytest.fixture
def ran(monkeypatch):
    """A list that grows by (operator, backend, "forward" or "backward", tensors and other arguments) per kernel run."""
    calls = []

    def spied(operator, backend, kernel):
        def watch(direction):
            function = getattr(kernel, direction)

            def run(*args):
                calls.append((operator, backend, direction, args))
                return function(*args)

            return run

        return dataclasses.replace(kernel, forward=watch("forward"), backward=watch("backward"))

    for name, operator in OPERATORS.items():
        for backend, kernel in list(operator.kernels.items()):
            monkeypatch.setitem(operator.kernels, backend, spied(name, backend, kernel))
    return calls
