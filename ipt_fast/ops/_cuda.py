"""The CUDA C++ backend of an operator: private operators of the same name in the library ipt_fast_cuda.

They take the operator's arguments and whether products may be in TF32. The library only implements them: a call fails
where a function of its has another number of arguments than the schema says.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import _extension
from .._precision import tf32_allowed
from . import _limits
from ._operator import Arguments, Kernel, Operator, as_channels_last

SHARED_MEMORY = 163 << 10  # bytes that a thread block may need, as in csrc/cuda and in setup.py
CHANNELS = (32, 48, 64, 96)
DEPTHS = (32, 48)
LARGEST_WINDOW = 1 << 14

# Where no measurement of this GPU says more: those predicted to be faster than Triton's in 16 bits.
PREDICTED = ("leffn", "leffn_layer", "focal_attention_layer", "grid_attention_layer")


@functools.cache
def _private(name: str) -> OpOverload:
    return getattr(torch.ops.ipt_fast_cuda, name).default


@functools.cache
def _device_error(type_: str, index: int | None) -> str | None:
    """None if kernels run on such a device, else the reason."""
    wanted = torch.ops.ipt_fast_cuda.device()
    if type_ != wanted:
        return f"the CUDA kernels run on {wanted} devices here; the tensors are on {type_}"
    if type_ == "cuda":
        gpu = torch.cuda.get_device_properties(index)
        if reason := _limits.capability_error(gpu.name, (gpu.major, gpu.minor), "the CUDA kernels"):
            return reason
        memory: int = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in PyTorch's stubs
        if memory < SHARED_MEMORY:
            need = SHARED_MEMORY >> 10
            return f"the CUDA kernels need {need} KB of shared memory a block; {gpu.name} has {memory >> 10}"
        if said := torch.ops.ipt_fast_cuda.device_error(index):
            built_for = _extension.build_info().get("cuda_architectures")
            return f"the CUDA kernels, built for {built_for}, do not run on {gpu.name}: {said}"
    return None


def key_of(operator: Operator, args: Arguments) -> str:
    """What the choice between kernels depends on, besides the operator: dtype, channels, heads, window or grid."""
    first = args[0]
    widths = first.shape[1:2] if operator.images else first.shape[:2]
    return "-".join(map(str, [str(first.dtype).removeprefix("torch."), *widths, *(a for a in args if type(a) is int)]))


@functools.cache
def _measured(device: int | None) -> dict[str, dict[str, str]]:
    """{operator: {key: backend}} as measured on this GPU; empty where that has not been done."""
    from ipt_fast.kernels import _launch

    return _launch.measured_on(device)["operators"]


def _machine_error() -> str | None:
    if torch.ops.ipt_fast_cuda.device() == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU here"
    return None


def channels_limit(channels: int) -> str | None:
    """None, or why the kernels of the layers do not take maps of so many channels."""
    if channels in CHANNELS:
        return None
    return f"the CUDA kernels take {', '.join(map(str, CHANNELS))} channels; these are {channels}"


def heads_limit(channels: int, num_heads: int) -> str | None:
    """None, or why the kernels of the attention layers do not take such heads."""
    if reason := channels_limit(channels):
        return reason
    depth = channels // num_heads
    return None if depth in DEPTHS else f"the CUDA kernels take heads of 32 or 48 channels; these have {depth}"


def window_limit(window_size: int) -> str | None:
    """None, or why the kernels do not take windows of this size."""
    if window_size <= LARGEST_WINDOW:
        return None
    return f"the CUDA kernels take windows of up to {LARGEST_WINDOW} pixels; this is {window_size}"


def grid_limit(grid_size: int) -> str | None:
    """None, or why the kernels do not take grids of this size."""
    return (
        None if grid_size <= 16 else f"the CUDA kernels take grids of up to 16 x 16; this is {grid_size} x {grid_size}"
    )


def leffn_limit(expand_weight: Tensor, depthwise_weight: Tensor, project_weight: Tensor) -> str | None:
    """None, or why the kernels do not take a feed-forward network with these weights."""
    (hidden, channels), size, outputs = expand_weight.shape[:2], depthwise_weight.shape[-1], project_weight.shape[0]
    if reason := channels_limit(channels):
        return reason
    if outputs != channels or hidden % 32 or size != 5:
        return (
            "the CUDA kernels take as many channels out as in, a multiple of 32 hidden ones and depthwise kernels of "
            f"5 x 5; these are {channels} to {outputs}, {hidden} and {size} x {size}"
        )
    return None


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()  # kernels read 16 bytes at a time


def register(
    operator: Operator,
    limits: _limits.Limits | None = None,
    has_backward: bool = False,
    lacks: Mapping[str, Any] | None = None,
) -> None:
    """Give ``operator`` the backend "cuda": ``ipt_fast_cuda::<name>``.

    It gets images channels-last, and weights and small parameters contiguous, the latter all in one dtype: the image's
    or float32.

    Args:
        operator: the `Operator`.
        limits: function of some of the operator's arguments, which its parameters name. It answers None or why the
            kernels do not take them.
        has_backward: whether gradients have kernels, too: ``ipt_fast_cuda::<name>_backward``, of the gradient and the
            same arguments. Without it they come from Triton's kernels where those can run, else from the reference.
        lacks: arguments that the kernels do not have, of a :class:`_limits.Lacking`.
    """
    known = _limits.Lacking(operator, lacks or {})
    name, gradients = operator.name, ", ".join(["Tensor"] * len(known.tensors))
    _extension.declare("ipt_fast_cuda", f"{name}({known.schema}, bool tf32) -> Tensor")
    if has_backward:
        takes = f"Tensor grad, {known.schema}, bool tf32"
        _extension.declare("ipt_fast_cuda", f"{name}_backward({takes}) -> ({gradients})")
    limits_of = _limits.by_name(operator, limits)

    def check(args: Arguments | None) -> str | None:
        if error := _extension.cuda_error():
            return error
        if args is None:
            return _machine_error()
        x = args[0]
        if reason := _device_error(x.device.type, x.device.index):
            return reason
        return _limits.dtype_error(x.dtype, "the CUDA kernels") or known.reason(args) or limits_of(args)

    def is_small(name: str, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and name not in operator.images and name not in operator.weights

    def all_prepared(args: Arguments) -> list[Any]:
        named = list(zip(known.arguments, known.strip(args), strict=True))
        mixed = any(is_small(name, value) and value.dtype != args[0].dtype for name, value in named)

        def prepared(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if name in operator.images:
                return _aligned(as_channels_last(value))
            return _aligned((value.float() if mixed and is_small(name, value) else value).contiguous())

        return [prepared(name, value) for name, value in named]

    def forward(*args: Any) -> Tensor:
        return _private(name)(*all_prepared(args), tf32_allowed())

    def backward(grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
        if has_backward:
            found = _private(f"{name}_backward")(_aligned(grad.contiguous()), *all_prepared(args), tf32_allowed())
            return known.fill(found)
        triton = operator.kernels["triton"]
        kernel = triton if triton.check(args) is None else operator.kernels["reference"]
        return kernel.backward(grad, *args)

    def automatic(args: Arguments) -> bool:
        if args[0].device.type != "cuda":
            return False
        if operator.kernels["triton"].check(args) is not None:
            return True
        measured = _measured(args[0].device.index).get(name, {}).get(key_of(operator, args))
        if measured is not None:
            return measured == "cuda"
        return name in PREDICTED and args[0].dtype != torch.float32

    operator.kernels["cuda"] = Kernel(check, forward, backward, automatic)
