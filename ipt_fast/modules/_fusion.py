"""When a fused operator may stand in for modules: only where it computes exactly what calling them would.

A fused operator reads the parameters of modules and calls none of them. That is their computation as long as nobody
changed it: hooks, adapters (LoRA), parametrisations, pruning, checkpointing, sharding, offloading and quantisation all
work through calls of modules, replaced modules or replaced tensors. Where one is found, the modules are called.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.modules.module as torch_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Identity, Linear
from torch.nn.modules.normalization import LayerNorm
from torch.utils.module_tracker import ModuleTracker

from ..ops._explain import Fusable as Fusable

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# What kernels can read. Tracing puts fake tensors in the place of parameters.
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)
# {class: its forward when this module was imported}: programs replace classes and their methods.
_STOCK: dict[type[nn.Module], Callable[..., Any]] = {cls: cls.forward for cls in (Conv2d, Linear, LayerNorm, Identity)}
# The same of classes of other people, which only `ipt_fast.acceleration` may stand in for.
_OTHERS: dict[type[nn.Module], Callable[..., Any]] = {}
_CONV_FORWARD = Conv2d._conv_forward


def stock(cls: type[ModuleT]) -> type[ModuleT]:
    """Class decorator: a fused operator may stand in for modules of exactly this class."""
    _STOCK[cls] = cls.forward
    return cls


def remember(cls: type[nn.Module]) -> None:
    """Take the forward that a class of other people has now for its own: :func:`changed` tells when it is replaced."""
    if cls not in _STOCK:
        _OTHERS.setdefault(cls, cls.forward)


def replaced(cls: type[nn.Module]) -> str | None:
    """The reason that lies in a known class whose forward is another now, or None."""
    known = _STOCK.get(cls, _OTHERS.get(cls))
    return None if known is cls.forward else f"the forward of {cls.__name__} is replaced"


def global_hooks() -> str | None:
    """The reason that lies in hooks of all modules, or None.

    Those by which FlopCounterMode learns where it is do not count: it counts fused operators by their formulas.
    """
    for hooks in _GLOBAL_HOOKS:
        if hooks and not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks.values()):
            return "there are hooks of all modules"
    return None


def changed(module: nn.Module, others: bool = False) -> str | None:
    """Why calling ``module`` alone, whatever is in it, may do something else than its class says, or None.

    Its class must be one of ours or of PyTorch's, with ``others`` one that was remembered.
    """
    cls, state = type(module), module.__dict__
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
    hooks = hooks or state["_backward_hooks"] or state["_backward_pre_hooks"]
    if cls not in _STOCK and not (others and cls in _OTHERS):
        return f"it is a {cls.__name__}"
    if reason := replaced(cls):
        return reason
    if "forward" in state or cls.__call__ is not nn.Module.__call__:
        return "its forward is replaced"
    if hooks:
        return "it has hooks"
    if module._compiled_call_impl is not None:
        return "it is compiled by itself"
    for name, parameter in state["_parameters"].items():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS:
            return f"its {name} is a {type(parameter).__name__}"
    return None


def _convolution(conv: nn.Module, size: int, groups: int) -> str | None:
    if reason := changed(conv):
        return reason
    if type(conv) is not Conv2d:
        return f"it is a {type(conv).__name__}"
    return _shape_of_convolution(conv, size, groups)


def _shape_of_convolution(conv: nn.Module, size: int, groups: int) -> str | None:
    state = conv.__dict__
    if "_conv_forward" in state or Conv2d._conv_forward is not _CONV_FORWARD:
        return "its forward is replaced"
    bias = state["_parameters"].get("bias", state.get("bias"))
    if bias is not None and type(bias) not in _PLAIN_TENSORS:
        return f"its bias is a {type(bias).__name__}"
    found = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode
    if found != ((size, size), (size // 2, size // 2), (1, 1), (1, 1), groups, "zeros"):
        return "its kernel, padding, stride, dilation or groups are others"
    return None


def pointwise(conv: nn.Module) -> str | None:
    """Why ``conv`` is no plain 1 x 1 convolution, or None."""
    return _convolution(conv, 1, 1)


def depthwise(conv: nn.Module, size: int) -> str | None:
    """Why ``conv`` is no plain depthwise convolution that keeps the size of maps, or None."""
    return _convolution(conv, size, getattr(conv, "out_channels", 0))


def dense(conv: nn.Module) -> str | None:
    """Why ``conv``, which is called itself, is no dense 3 x 3 convolution that keeps the size of maps, or None."""
    weight = getattr(conv, "weight", None)
    if type(weight) not in _PLAIN_TENSORS:
        return f"its weight is a {type(weight).__name__}"
    return _shape_of_convolution(conv, 3, 1)


def linear(module: nn.Module) -> str | None:
    """Why ``module`` is no plain linear layer with a bias, or None."""
    if reason := changed(module):
        return reason
    if type(module) is not Linear:
        return f"it is a {type(module).__name__}"
    return None if module.bias is not None else "it has no bias"


def token_norm(module: nn.Module) -> str | None:
    """Why ``module`` is neither a plain layer norm over the last axis with weight and bias nor nothing, or None."""
    if (reason := changed(module)) or isinstance(module, Identity):
        return reason
    if not isinstance(module, LayerNorm):
        return f"it is a {type(module).__name__}"
    if module.weight is None or module.bias is None:
        return "it has no weight or no bias"
    if not module.eps > 0:
        return f"its eps is {module.eps}"
    return None if len(module.normalized_shape) == 1 else "it normalises several axes"


def first(**reasons: str | None) -> str | None:
    """The first reason of modules by name, as a sentence that names the module; None where there is none."""
    for name, reason in reasons.items():
        if reason is not None:
            return f"{name}: {reason}"
    return None
