"""One training step on several processes, by PyTorch's own engine: replicated (DDP) or sharded (FSDP2).

Both act where a module is called, so the loss is one, :class:`LossOf`. Activation checkpointing is here, too, as it is
done for the same parts of a model: its transformer layers.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..models.contract import describe
from ..ops._explain import Fusable
from .distributed import World

STRATEGIES = ("ddp", "fsdp")


class Objective(Protocol):
    """What a model is trained for: see :mod:`ipt_fast.training.objectives`."""

    def loss(self, model: Any, batch: Sequence[Tensor]) -> Tensor: ...


class LossOf(nn.Module):
    """The loss of a model and a batch."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        return self.objective.loss(self.model, batch)


def transformer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: layer} of the outermost modules that run parts of themselves as fused operators.

    Fused operators read the parameters of modules inside them, so a layer is sharded, and computed again, as a whole.
    """
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in layers)
        if not inside and isinstance(module, Fusable) and module.reasons_against_fusing():
            layers[path] = module
    return layers


def checkpoint_activations(model: nn.Module) -> None:
    """From now on keep only the inputs of each transformer layer for the backward pass, which computes the rest again.

    Raises:
        ValueError: the model has no transformer layers.
    """
    layers = transformer_layers(model)
    if not layers:
        name = type(model).__name__
        raise ValueError(f"activation_checkpointing must be False for {name}, without transformer layers; got True")
    for layer in layers.values():
        layer.forward = _checkpointed(layer.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def replicate(loss: LossOf, device: torch.device) -> DistributedDataParallel:
    """Each process has all weights; gradients are averaged in buckets while the backward pass goes on (DDP)."""
    for parameter in loss.parameters():
        if parameter.is_contiguous():  # of an axis of length 1 any stride is; buckets want those of the gradient
            parameter.data = parameter.data.flatten().view(parameter.shape)
    return DistributedDataParallel(
        loss,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # A batch of one task has no gradients of the other tasks' heads.
        find_unused_parameters=len(describe(loss.model).tasks) > 1,
    )


def shard(module: Any, world: World, device: torch.device) -> None:
    """Each process keeps a part of every weight; a transformer layer's are together only while it runs (FSDP2).

    Weights and gradients travel in their own dtype. Under autocast a layer still needs norms in fp32, and rounds the
    other weights itself, so that several processes compute what one does.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    module.to(memory_format=torch.contiguous_format)  # the only one that can be sharded
    for layer in transformer_layers(module).values():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def accumulating(loss: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """A context for one micro-batch: processes exchange gradients after the last one only."""
    if isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(last)
    if isinstance(loss, DistributedDataParallel) and not last:
        return loss.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, put together in every process; all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, sharded as ``other`` is where it is."""
    if not isinstance(other, DTensor):
        return tensor
    tensor = tensor.to(other.device).contiguous()
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
