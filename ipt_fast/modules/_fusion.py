"""When a fused operator may stand in for modules: only where it computes exactly what calling them would.

A fused operator reads the parameters of modules and calls none of them. That is their computation as long as nobody
changed it: hooks, adapters (LoRA), parametrisations, pruning, checkpointing, sharding, offloading and quantisation all
work through calls of modules, replaced modules or replaced tensors. Where one is found, the modules are called.
"""

import torch
import torch.nn.modules.module as torch_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Identity, Linear
from torch.nn.modules.normalization import LayerNorm
from torch.utils.module_tracker import ModuleTracker

# What kernels can read. Tracing puts fake tensors in the place of parameters.
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# {class: what it computes}, as it was when this module was imported: programs replace classes and their methods.
_STOCK = {
    Conv2d: (Conv2d.forward, Conv2d._conv_forward),
    Linear: (Linear.forward, None),
    LayerNorm: (LayerNorm.forward, None),
    Identity: (Identity.forward, None),
}


def stock(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: a fused operator may stand in for modules of exactly this class."""
    _STOCK[cls] = (cls.forward, getattr(cls, "_conv_forward", None))
    return cls


def global_hooks() -> str | None:
    """The reason that lies in hooks of all modules, or None.

    Those by which FlopCounterMode learns where it is do not count: it counts fused operators by their formulas.
    """
    for name in _HOOKS:
        for hook in getattr(torch_module, f"_global{name}").values():
            if not isinstance(getattr(hook, "__self__", None), ModuleTracker):
                return "there are hooks of all modules"
    return None


def hooked(module: nn.Module) -> str | None:
    """The reason that lies in hooks of ``module`` or in what stands in for its forward, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "its forward is replaced"
    if module._compiled_call_impl is not None:
        return "it is compiled by itself"
    return None


def changed(module: nn.Module) -> str | None:
    """Why calling ``module`` alone, whatever is in it, may do something else than its class says, or None."""
    cls = type(module)
    if cls not in _STOCK:
        return f"it is a {cls.__name__}"
    if _STOCK[cls] != (cls.forward, getattr(cls, "_conv_forward", None)):
        return f"the forward of {cls.__name__} is replaced"
    if reason := hooked(module):
        return reason
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS:
            return f"its {name} is a {type(parameter).__name__}"
    return None


def _convolution(conv: nn.Module, kernel: int | None, groups: object) -> str | None:
    if reason := changed(conv):
        return reason
    if conv.bias is not None:
        return "it has a bias"
    size = conv.kernel_size[0]
    plain = (size, size), (1, 1), (size // 2, size // 2), (1, 1), groups, "zeros"
    if plain != (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode):
        return "its kernel, stride, padding, dilation or groups are others"
    return None if kernel in (None, size) else f"its kernel is {size} x {size}"


def pointwise(conv: nn.Module) -> str | None:
    """Why ``conv`` is no plain 1 x 1 convolution without bias, or None."""
    return _convolution(conv, 1, 1)


def depthwise(conv: nn.Module, kernel: int) -> str | None:
    """Why ``conv`` is no plain depthwise convolution without bias that keeps the size, or None."""
    return changed(conv) or _convolution(conv, kernel, conv.out_channels)


def linear(module: nn.Module) -> str | None:
    """Why ``module`` is no plain linear layer with a bias, or None."""
    return changed(module) or (None if module.bias is not None else "it has no bias")


def token_norm(module: nn.Module) -> str | None:
    """Why ``module`` is neither a plain layer norm over the last axis with weight and bias nor nothing, or None."""
    if (reason := changed(module)) or isinstance(module, Identity):
        return reason
    if not isinstance(module, LayerNorm):
        return f"it is a {type(module).__name__}"
    if module.weight is None or module.bias is None:
        return "it has no weight or no bias"
    return None if len(module.normalized_shape) == 1 else "it normalises several axes"


def first(**reasons: str | None) -> str | None:
    """The first reason of modules by name, as a sentence that names the module; None where there is none."""
    for name, reason in reasons.items():
        if reason is not None:
            return f"{name}: {reason}"
    return None
