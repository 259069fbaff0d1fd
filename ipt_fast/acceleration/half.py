"""The flags of a descriptor of spandrel that say whether its model may run in 16 bit, once that is accelerated.

A flag is raised, never lowered, and only where the structure and an experiment agree:

- Every module that a rule knows by name runs by it now, and beside these, which keep norms, softmax and sums in
  float32, the model calls only functions of ``SAFE``: products with weights, norms, means and poolings, which PyTorch
  sums in float32, functions of single values that grow no faster than their argument, and what moves values. Not among
  them are what fails in 16 bit: matrix products of activations, softmax, squares, sums, divisions but by numbers.
- A copy of the model in float16 (bfloat16) returns for the example what float32 does: finite, with an error of at most
  ``UNITS`` units in the last place of the largest value, 1.6 % in float16 and 12.5 % in bfloat16.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .accelerated import Accelerated, reason_against
from .report import Row
from .verify import largest_error

FLAGS = {"supports_half": torch.float16, "supports_bfloat16": torch.bfloat16}
UNITS = 16
_SAFE = {
    "products with weights, and norms": "convolution addmm mm t native_layer_norm native_batch_norm",
    "means and poolings": "mean _adaptive_avg_pool2d avg_pool2d max_pool2d_with_indices upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d",
    "of single values": "add add_ sub sub_ mul mul_ neg clamp clamp_ clamp_min clamp_max relu relu_ leaky_relu "
    "leaky_relu_ prelu _prelu_kernel elu gelu silu silu_ mish sigmoid sigmoid_ tanh hardtanh hardtanh_ hardswish "
    "softplus eq ne",
    "what moves or makes values": "view _unsafe_view reshape permute transpose squeeze unsqueeze expand clone "
    "contiguous slice select split split_with_sizes unbind cat stack roll flip index index_select gather pixel_shuffle "
    "pixel_unshuffle constant_pad_nd reflection_pad2d replication_pad2d alias detach as_strided _to_copy copy_ "
    "lift_fresh empty zeros ones full arange fill_ zero_ empty_like zeros_like ones_like new_zeros new_empty",
}
SAFE = frozenset(name for names in _SAFE.values() for name in names.split())


def raise_flags(descriptor: Any, module: nn.Module, example: Tensor, rows: list[Row]) -> dict[str, bool]:
    """Raise the flags of a descriptor, or of None, whose accelerated module passes both tests; without gradients.

    Returns:
        The flags as they were before.
    """
    if descriptor is None:
        return {}
    before = {name: getattr(descriptor, name) for name in FLAGS}
    if not all(before.values()) and reason_against_half(module, example, rows) is None:
        exact = module(example)
        for name, dtype in FLAGS.items():
            if not before[name] and _agrees(module, example, exact, dtype):
                setattr(descriptor, name, True)
    return before


def restoring(flags: dict[str, bool], descriptor: Any, undo: Callable[[], None]) -> Callable[[], None]:
    """``undo``, which also gives the descriptor these flags."""

    def run() -> None:
        undo()
        for name, value in flags.items():
            setattr(descriptor, name, value)

    return run


def reason_against_half(module: nn.Module, example: Tensor, rows: list[Row]) -> str | None:
    """What in the structure of a model speaks against 16 bit, or None.

    Args:
        module: the model, accelerated, in eval mode.
        example: what it takes.
        rows: the modules that rules know by name.
    """
    if not any(row.rule for row in rows):
        return "no module runs on the operators"
    for row in rows:
        part = module.get_submodule(row.path)
        reason = reason_against(part) if isinstance(part, Accelerated) else row.reason
        if reason is not None:
            return f"{row.path} is left as it is: {reason}"
    with _Calls([part for part in module.modules() if isinstance(part, Accelerated)]) as calls:
        module(example)
    risky = sorted(calls.names - SAFE)
    return f"beside the accelerated modules it calls {', '.join(risky)}" if risky else None


def _agrees(module: nn.Module, example: Tensor, exact: Any, dtype: torch.dtype) -> bool:
    try:
        found = copy.deepcopy(module).to(dtype)(example.to(dtype))
    except RuntimeError:  # of a model that mixes this dtype with float32
        return False
    return largest_error(found, exact) <= UNITS * torch.finfo(dtype).eps


class _Calls(TorchDispatchMode):
    """The names of PyTorch's functions that are called beside certain modules; a division by a number is none."""

    def __init__(self, beside: list[nn.Module]) -> None:
        super().__init__()
        self.names, self._within, self._beside = set[str](), 0, beside

    def __enter__(self) -> Self:
        enter, leave = functools.partial(self._count, 1), functools.partial(self._count, -1)
        self._handles = [part.register_forward_pre_hook(enter) for part in self._beside]
        self._handles += [part.register_forward_hook(leave, always_call=True) for part in self._beside]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _count(self, by: int, *_: Any) -> None:
        self._within += by

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.rpartition("::")[2]
        by_number = name in ("div", "div_") and not isinstance(args[1], Tensor)
        if not self._within and not by_number:
            self.names.add(name)
        return function(*args, **(kwargs or {}))
