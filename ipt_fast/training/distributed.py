"""Several processes that train one model, as ``torchrun`` starts them: each has a share of every batch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._device import usable_device

ResultT = TypeVar("ResultT")


class FailedElsewhereError(RuntimeError):
    """What went wrong is raised in the first process, so that it is said once."""


class _Gather(torch.autograd.Function):
    """Tensors of one shape of all processes, joined along their first axis."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


@dataclass(frozen=True)
class World:
    """This process's place among ``size``; with one process every method leaves things as they are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "World":
        """The processes that torchrun has started, or this one alone."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Part from the others at the end of all work."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def device(self, name: str | None) -> torch.device:
        """The device of that name; "cuda" is the GPU with this process's number on its machine, None one if there is.

        Raises:
            ValueError: it cannot be used.
        """
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and self.size > 1:
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = usable_device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return device

    def share(self, batch: int, parts: int = 1) -> range:
        """The places of a batch that are this process's, of which each of ``parts`` micro-batches has as many.

        Raises:
            ValueError: the batch cannot be divided into as many equal parts.
        """
        if batch % (self.size * parts):
            parties = [f"the {self.size} processes"] * (self.size > 1) + [f"accumulate {parts}"] * (parts > 1)
            divisor = " times ".join(parties)
            raise ValueError(f"batch_size must be a multiple of {divisor}; got {batch}")
        own = batch // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def gather(self, features: Tensor) -> Tensor:
        """(B, ...) of every process, one after the other; gradients flow back to all of them."""
        return features if self.size == 1 else _Gather.apply(features.contiguous())

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value / self.size

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def first(self, text: str | None) -> str | None:
        """The text of the first process that has one, in all of them."""
        return next((found for found in self._texts(text) if found is not None), None)

    def together(self, action: Callable[[], ResultT]) -> ResultT:
        """The action's result, once every process has one. Where it fails in any, it fails in all.

        Raises:
            Exception: what this process's action raised, or in the first process a ValueError with what another's did.
            FailedElsewhereError: in the others.
        """
        try:
            result = action()
        except Exception as error:
            self.fail(error)
            raise
        self.fail(None)
        return result

    def fail(self, error: Exception | None) -> None:
        """Raise in every process where one has an error, as :meth:`together` does; all must call this."""
        if self.size > 1 and not self.any(error is not None):
            return
        if self.size > 1:
            message = self.first(None if error is None else str(error) or type(error).__name__)
            if self.rank:
                raise FailedElsewhereError("another process failed; the first one tells how") from error
            error = error or ValueError(message)
        if error is not None:
            raise error

    def _texts(self, text: str | None) -> list[str | None]:
        texts = [text] * self.size
        if self.size > 1:
            dist.all_gather_object(texts, text)
        return texts
