"""Checks of the norms that operators have built in."""

from torch import Tensor

from . import _check


def norm_2d(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> int:
    """Check the arguments of a norm over the channels of ``x`` (B, C, H, W); returns C."""
    channels = x.shape[1]
    _check.shape(operator, "norm_weight", weight, (channels,))
    if bias is not None:
        _check.shape(operator, "norm_bias", bias, (channels,))
    _check.positive_number(operator, "eps", eps)
    _check.flag(operator, "centered", centered)
    return channels


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
