"""Layers that blocks of several families are made of: what is expected of them, and how they are computed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...modules import _fusion
from ...modules.convolution import EMULATED, taken_for_channels_last
from ...ops._kernel import unwatched
from ...ops._packed import computing_dtype
from ._rule import expect, pointwise
from ._weights import of_weights, remembers

# -- what is expected -------------------------------------------------------------------------------------------


def expect_pointwise(**convolutions: Any) -> None:
    """1 x 1 convolutions, by name."""
    for name, conv in convolutions.items():
        expect_no(name, _fusion.pointwise(conv))


def expect_depthwise(size: int, **convolutions: Any) -> None:
    """Depthwise convolutions of size x size that keep the size of maps, by name."""
    for name, conv in convolutions.items():
        expect_no(name, _fusion.depthwise(conv, size))


def expect_dense(**convolutions: Any) -> None:
    """Dense 3 x 3 convolutions that keep the size of maps, by name."""
    for name, conv in convolutions.items():
        expect_no(name, _fusion.changed(conv) or _fusion.dense(conv))


def expect_no(name: str, reason: str | None) -> None:
    """The part ``name`` of a module must give no reason against it."""
    expect(reason is None, f"its {name}: {reason}")


def expect_gelu(name: str, module: Any) -> None:
    expect(type(module) is nn.GELU and module.approximate == "none", f"its {name} is no exact GELU")


def expect_sequence(name: str, sequence: Any, *types: type) -> None:
    """A sequence of modules of exactly these classes; GELUs are exact, batch norms keep statistics, pools pool all."""
    expect(type(sequence) is nn.Sequential, f"its {name} is a {type(sequence).__name__}")
    found = [type(module) for module in sequence]
    expect(found == list(types), f"its {name} is {', '.join(cls.__name__ for cls in found)}")
    for module in sequence:
        if isinstance(module, nn.GELU):
            expect_gelu(name, module)
        if isinstance(module, nn.BatchNorm2d):
            expect(module.affine and module.track_running_stats, f"its {name} has a batch norm without statistics")
        if isinstance(module, nn.AdaptiveAvgPool2d):
            expect(module.output_size in (1, (1, 1)), f"its {name} pools to {module.output_size}")


def check_channel_norm(module: Any, name: str) -> None:
    """A layer norm over the channels of a map, as models define it for themselves; centred, or Restormer's other one.

    Those without an attribute ``eps`` have that of Restormer.
    """
    norm = getattr(module, name)
    body = getattr(norm, "body", norm)
    kind = type(body).__name__
    known = ("BiasFree_LayerNorm", "WithBias_LayerNorm", "LayerNorm2d", "LayerNorm")
    expect(kind in known and not isinstance(body, nn.LayerNorm), f"its {name} is a {kind}")
    expect(getattr(body, "data_format", "channels_first") == "channels_first", f"its {name} is of the last axis")
    expect(body.weight.dim() == 1, f"its {name} has a weight of {tuple(body.weight.shape)}")
    expect((kind == "BiasFree_LayerNorm") == (getattr(body, "bias", None) is None), f"its {name} has an unknown form")


def parts_below(module: nn.Module) -> list[nn.Module]:
    """Everything in a module, of a rule that calls nothing or little of it."""
    return list(module.modules())[1:]


# -- how they are computed --------------------------------------------------------------------------------------


def norm_of(norm: Any) -> dict[str, Any]:
    """The arguments by which operators take a norm that :func:`check_channel_norm` found well."""
    body = getattr(norm, "body", norm)
    bias = getattr(body, "bias", None)
    eps = getattr(body, "eps", 1e-5)
    return {"norm_weight": body.weight, "norm_bias": bias, "eps": eps, "centered": bias is not None}


def normalised(x: Tensor, norm: Any) -> Tensor:
    """The norm of a map, channels-last."""
    arguments = norm_of(norm)
    weight, bias = arguments.pop("norm_weight"), arguments.pop("norm_bias")
    return ops.layer_norm_2d(x, weight, bias, **arguments)


def project(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer, or a 1 x 1 convolution, of the channels of a map; channels-last."""
    return _project(x, layer.weight, layer.bias)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def normalise_and_project(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """A linear layer of the normalised channels of a map; channels-last.

    On GPUs the product is cuBLAS's: for wide maps and float32 the operator's kernels are a norm and a product, too. For
    others they are one, which moves less, but where one was measured (96 to 288 channels in benchmarks/results) it
    reached half the rate of a copy, which is as much time as a norm and a product of cuBLAS's may take.
    """
    if x.device.type == "cpu":
        weight, bias = pointwise(linear), linear.bias
        return ops.pointwise_layer(x, weight, bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)
    return project(ops.layer_norm_2d(x, norm.weight, norm.bias, eps=norm.eps), linear)


def convolve(x: Tensor, conv: nn.Conv2d, activation: str = "none") -> Tensor:
    """A convolution that keeps the size of a map, without a call of the module; of the layout that PyTorch's has.

    The activation behind it is "none" or "gelu", the exact one.
    """
    if conv.groups == 1 and conv.kernel_size == (3, 3) and _gains(x, conv.weight):
        y = ops.dense_convolution(x, conv.weight, conv.bias, activation=activation)
        return y if 1 in (x.stride(1), conv.weight.stride(1)) else y.contiguous()
    weight, bias = conv.weight, conv.bias
    if remembers(conv) and taken_for_channels_last(x) and (dtype := computing_dtype(x)) not in EMULATED:
        weight, bias = of_channels_last(conv, dtype)
        x = x.to(dtype)
    y = F.conv2d(x, weight, bias, padding=conv.padding, groups=conv.groups)  # type: ignore[arg-type]
    return y if activation == "none" else F.gelu(y)


@of_weights
def of_channels_last(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of products, the weight in the layout of channels-last maps."""
    weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last, copy=True)
    return weight, None if conv.bias is None else conv.bias.detach().to(dtype)


# With fewer channels on either side, or on a smaller map, of which the weight's transformation would be a large part,
# PyTorch's convolution is as fast.
LEAST_CHANNELS, LEAST_PIXELS = 32, 32 * 32
WINOGRAD = (torch.float32, torch.float16)  # dtypes of the operator's own kernel wherever it runs


def _gains(x: Tensor, weight: Tensor) -> bool:
    """Whether the operator is faster than PyTorch's convolution, to which also falls what neither of them takes."""
    fits = x.dim() == 4 and x.shape[1] == weight.shape[1]
    large = fits and min(weight.shape[:2]) >= LEAST_CHANNELS and x.numel() >= LEAST_PIXELS * x.shape[1]
    on_cpu = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    # The operator's gradients come together; PyTorch leaves out what nobody wants.
    all_or_none = not torch.is_grad_enabled() or x.requires_grad == weight.requires_grad
    return large and on_cpu and x.dtype == weight.dtype and x.dtype in WINOGRAD and all_or_none


def mean_of_pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1)."""
    # The mean of 16 bits over several axes is that of a copy in float32. A pool would keep the map for its gradient,
    # and the width in what is traced.
    if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0 and unwatched():
        x = F.avg_pool2d(x, (1, x.shape[3]))
    return x.mean((2, 3), keepdim=True)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the place of ``x``, which nothing else reads, unless somebody watches."""
    return (x.add_ if unwatched() else x.add)(y)


def add_product(x: Tensor, first: Tensor, second: Tensor, scale: float = 1.0) -> Tensor:
    """x + scale * first * second, likewise."""
    return (x.addcmul_ if unwatched() else x.addcmul)(first, second, value=scale)


def convolve_normalise_and_activate(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """GELU(norm(conv(x))) of a pointwise or depthwise convolution.

    With a batch norm in evaluation mode it is one convolution.
    """
    if norm.training:
        return F.gelu(norm(conv(x)))
    weight, bias = folded(conv, norm)
    if conv.kernel_size != (1, 1):
        return ops.depthwise_layer(x, weight, bias)
    if x.device.type == "cpu":
        return ops.pointwise_layer(x, weight, bias, activation="gelu")
    return F.gelu(_project(x, weight, bias))


@of_weights
def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes norm(conv(x)) with the norm's running statistics."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    dtype = conv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)  # so is all that is computed with what is wide
    scale = norm.weight * torch.rsqrt(variance.to(wide) + norm.eps)
    shift = -mean.to(wide) if conv.bias is None else conv.bias.to(wide) - mean
    bias = torch.addcmul(norm.bias, shift, scale)
    return (conv.weight * scale.view(-1, 1, 1, 1)).to(dtype), bias.to(dtype)
