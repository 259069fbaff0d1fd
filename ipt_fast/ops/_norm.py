"""Checks of the norms that operators have built in."""

from torch import Tensor

from . import _check


def norm_2d(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> int:
    """Check the arguments of a norm over the channels of ``x`` (B, C, H, W); returns C."""
    channels = x.shape[1]
    norm_parameters(operator, x, norm_weight=weight, norm_bias=bias)
    _check.positive_number(operator, "eps", eps)
    _check.flag(operator, "centered", centered)
    return channels


def optional_norm_2d(
    operator: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> None:
    """The same of a norm that may be absent: then ``weight`` and ``bias`` are None."""
    if weight is None and bias is not None:
        raise ValueError(f"{operator}: norm_bias must be None where norm_weight is; got shape {tuple(bias.shape)}")
    norm_parameters(operator, x, norm_weight=weight, norm_bias=bias)
    _check.positive_number(operator, "eps", eps)
    _check.flag(operator, "centered", centered)


def norm_parameters(operator: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Check parameters (C,), or (B, C) of each image, of the norm or the gate of ``x`` (B, C, H, W); some are None."""
    batch, channels = x.shape[:2]
    for name, value in parameters.items():
        if value is not None:
            _check.shape(operator, name, value, (channels,), (batch, channels))


def one_for_all(norm_weight: Tensor, norm_bias: Tensor | None) -> str | None:
    """None, or why kernels whose norm is the same for all images do not take these parameters."""
    if norm_weight.dim() == 1 and (norm_bias is None or norm_bias.dim() == 1):
        return None
    return "these kernels take a norm whose weight and bias are (C,), the same for all images"


def token_norm(operator: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> int:
    """Check the arguments of a norm over the channels of ``x`` (B, N, D), which may be absent; returns D."""
    dim = x.shape[2]
    if weight is None and bias is not None:
        raise ValueError(f"{operator}: norm_bias must be None where norm_weight is; got shape {tuple(bias.shape)}")
    for name, value in (("norm_weight", weight), ("norm_bias", bias)):
        if value is not None:
            _check.shape(operator, name, value, (dim,))
    _check.positive_number(operator, "eps", eps)
    return dim
