"""Several processes that train one model, as ``torchrun`` starts them: each has a share of every batch."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather


@dataclass(frozen=True)
class World:
    """This process's place among ``size``; with one process every method leaves things as they are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device_type: str) -> "World":
        """The processes that torchrun has started, or this one alone."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, batch: int) -> range:
        """The places of a batch that are this process's."""
        if batch % self.size:
            raise ValueError(f"batch_size must be a multiple of the {self.size} processes; got {batch}")
        own = batch // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def gather(self, features: Tensor) -> Tensor:
        """(B, ...) of every process, one after the other; gradients flow back to all of them."""
        return features if self.size == 1 else torch.cat(all_gather(features.contiguous()))

    def average_gradients(self, model: nn.Module) -> None:
        """Every process gets the mean of all gradients. All must have the same parameters in use."""
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value / self.size

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true in any process."""
        return bool(self.mean(torch.tensor(float(flag), device=device)) > 0)
