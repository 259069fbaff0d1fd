"""use_backend as a decorator, shared between threads and tasks, beside checkpointing and compilation."""

import asyncio
import contextvars
import dataclasses
import inspect
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ipt_fast
from ipt_fast import _extension
from ipt_fast.ops import _select
from ipt_fast.ops._operator import OPERATORS

policy = _select.policy


@pytest.mark.parametrize("shared", ["decorator", "block"])
def test_one_object_in_two_threads_at_once(shared):
    demand, barrier, seen, errors = ipt_fast.use_backend("reference"), threading.Barrier(2), [], []

    def body():
        barrier.wait()
        seen.append(policy())
        barrier.wait()

    decorated = demand(body)

    def run():
        try:
            for _ in range(3):
                if shared == "decorator":
                    decorated()
                else:
                    with demand:
                        body()
                assert policy() == "auto"
        except Exception as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and seen == ["reference"] * 6


def test_coroutine_functions_in_tasks_at_once():
    seen = []

    @ipt_fast.use_backend("reference")
    async def work(number):
        for _ in range(3):
            seen.append(policy())
            await asyncio.sleep(0.001 * number)
        return number

    async def main():
        results = asyncio.gather(work(1), work(2))
        for _ in range(4):
            assert policy() == "auto"
            await asyncio.sleep(0.001)
        return await results

    assert asyncio.run(main()) == [1, 2] and seen == ["reference"] * 6
    assert inspect.iscoroutinefunction(work)


def test_a_coroutine_that_is_suspended_leaves_the_block():
    """Driven by hand, in one context: as an event loop of one's own does."""

    @ipt_fast.use_backend("reference")
    async def work():
        first = policy()
        try:
            await asyncio.sleep(0)
        except KeyError:
            return first, policy()

    coroutine = work()
    coroutine.send(None)
    assert policy() == "auto"
    with pytest.raises(StopIteration) as stopped:
        coroutine.throw(KeyError())
    assert stopped.value.value == ("reference", "reference") and policy() == "auto"


def test_generators_leave_the_block_between_their_steps():
    closed = []

    @ipt_fast.use_backend("reference")
    def steps():
        try:
            value = yield policy()
            try:
                yield value, policy()
            except KeyError:
                yield "caught", policy()
            return policy()
        finally:
            closed.append(policy())

    def delegating():
        return (yield from steps())

    generator = delegating()
    assert next(generator) == "reference" and policy() == "auto"
    assert generator.send(5) == (5, "reference") and policy() == "auto"
    assert generator.throw(KeyError()) == ("caught", "reference") and policy() == "auto"
    with pytest.raises(StopIteration) as stopped:
        next(generator)
    assert stopped.value.value == "reference" and closed == ["reference"]
    other = steps()
    next(other)
    other.close()
    assert closed == ["reference"] * 2 and policy() == "auto"
    one, two = steps(), ipt_fast.use_backend("auto")(steps)()
    assert [next(one), next(two), policy()] == ["reference", "reference", "auto"]


def test_asynchronous_generators():
    closed = []

    @ipt_fast.use_backend("reference")
    async def steps():
        try:
            value = yield policy()
            await asyncio.sleep(0)
            try:
                yield value, policy()
            except KeyError:
                yield policy()
        finally:
            closed.append(policy())

    async def main():
        generator = steps()
        assert await generator.asend(None) == "reference" and policy() == "auto"
        assert await generator.asend(3) == (3, "reference") and policy() == "auto"
        assert await generator.athrow(KeyError()) == "reference"
        assert [item async for item in generator] == []
        other = steps()
        await other.asend(None)
        await other.aclose()
        assert policy() == "auto"

    asyncio.run(main())
    assert closed == ["reference"] * 2


def test_decorated_functions_keep_their_names_arguments_and_exceptions():
    @ipt_fast.use_backend("reference")
    def function(a, *, b=2):
        """Doc."""
        if a is None:
            raise KeyError(policy())
        return a + b, policy()

    assert function.__name__ == "function" and function.__doc__ == "Doc."
    assert function(1, b=3) == (4, "reference")
    with pytest.raises(KeyError, match="reference"):
        function(None)
    assert policy() == "auto"

    class Holder:
        @ipt_fast.use_backend("reference")
        def method(self):
            return self, policy()

    holder = Holder()
    assert holder.method() == (holder, "reference")

    class Async:
        async def __call__(self):
            await asyncio.sleep(0)
            return policy()

    class Steps:
        @ipt_fast.use_backend("reference")
        @staticmethod
        def static():
            yield policy()

        @ipt_fast.use_backend("reference")
        @classmethod
        def of_class(cls):
            return cls, policy()

        def __call__(self):
            yield policy()

    assert asyncio.run(ipt_fast.use_backend("reference")(Async())()) == "reference"
    assert list(ipt_fast.use_backend("reference")(Steps())()) == list(Steps.static()) == ["reference"]
    assert Steps.of_class() == Steps().of_class() == (Steps, "reference")
    for wrong in (Holder, 3):
        with pytest.raises(TypeError, match="must be a function or method"):
            ipt_fast.use_backend("reference")(wrong)


def test_recursion_and_copied_contexts():
    @ipt_fast.use_backend("reference")
    def count(n):
        return [policy()] if n == 0 else [policy(), *count(n - 1)]

    assert count(3) == ["reference"] * 4 and policy() == "auto"
    with ipt_fast.use_backend("reference"):
        copied = contextvars.copy_context()
    assert copied.run(policy) == "reference" and policy() == "auto"


@pytest.fixture
def forwards(monkeypatch):
    """The backends of the forwards of layer_norm_2d."""
    ran = []
    kernels = OPERATORS["layer_norm_2d"].kernels
    for backend, kernel in list(kernels.items()):

        def forward(*args, backend=backend, kernel=kernel):
            ran.append(backend)
            return kernel.forward(*args)

        monkeypatch.setitem(kernels, backend, dataclasses.replace(kernel, forward=forward))
    return ran


@pytest.mark.skipif(not _extension.load(), reason=str(_extension.error()))
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_again_on_the_same_backend(reentrant, forwards):
    layer, x = ipt_fast.modules.LayerNorm2d(4), torch.rand(1, 4, 3, 3, requires_grad=True)
    with ipt_fast.use_backend("reference"):
        if reentrant:
            y = checkpoint(ipt_fast.use_backend("reference")(layer), x, use_reentrant=True)
        else:
            y = checkpoint(layer, x, use_reentrant=False, context_fn=ipt_fast.keep_backend)
    y.sum().backward()
    assert forwards == ["reference", "reference"]
    forwards.clear()
    y = checkpoint(layer, x, use_reentrant=False, context_fn=ipt_fast.keep_backend)
    with ipt_fast.use_backend("reference"):
        y.sum().backward()
    assert forwards == ["cpu", "cpu"]


def test_inside_a_compiled_function_it_is_refused_by_name():
    layer, x = ipt_fast.modules.LayerNorm2d(4), torch.rand(1, 4, 3, 3)

    def function(x):
        with ipt_fast.use_backend("reference"):
            return layer(x)

    decorated = ipt_fast.use_backend("reference")(layer.forward)
    for each in (function, lambda x: decorated(x)):
        with pytest.raises(Exception, match="use_backend belongs around the call of a compiled function"):
            torch.compile(each, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(torch.compile(function, backend="eager")(x), layer(x))
    assert policy() == "auto"
