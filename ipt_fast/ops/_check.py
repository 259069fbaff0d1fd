"""Checks of arguments that several operators share. Each error names the argument, what came and what is allowed."""

import math
from typing import Any

from torch import Tensor


def positive_int(operator: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{operator}: {name} must be an int; got {type(value).__name__}")
    if not 1 <= value < 2**63:  # what an operator's schema can hold
        raise ValueError(f"{operator}: {name} must be at least 1 and below 2**63; got {value}")


def positive_number(operator: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: {name} must be a number; got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{operator}: {name} must be positive and finite; got {value}")


def flag(operator: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{operator}: {name} must be True or False; got {value!r}")


def one_of(operator: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{operator}: {name} must be one of {', '.join(allowed)}; got {value!r}")


def heads_divide(operator: str, channels: int, num_heads: int) -> None:
    positive_int(operator, "num_heads", num_heads)
    if channels % num_heads:
        raise ValueError(f"{operator}: num_heads must divide the {channels} channels; got {num_heads}")


def shape(operator: str, name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    # "in" does not compare symbolic sizes, and tuples of different lengths compare their first entries, too: a trace
    # would keep a batch from being as large as a number of channels.
    if not any([len(each) == tensor.dim() and tensor.shape == each for each in allowed]):
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{operator}: {name} must have shape {expected}; got {tuple(tensor.shape)}")


def packed_qkv(operator: str, qkv: Tensor, num_heads: int) -> int:
    """Check that ``qkv`` holds q, k and v of ``num_heads`` heads; returns the channels of one of them."""
    if qkv.dim() != 4 or qkv.shape[1] % 3 or qkv.shape[1] == 0:
        raise ValueError(f"{operator}: qkv must have shape (B, 3C, H, W); got {tuple(qkv.shape)}")
    heads_divide(operator, qkv.shape[1] // 3, num_heads)
    return qkv.shape[1] // 3


def per_head(operator: str, name: str, temperature: Tensor, num_heads: int) -> Tensor:
    """A (heads,) or (heads, 1, 1) parameter as (heads,)."""
    shape(operator, name, temperature, (num_heads,), (num_heads, 1, 1))
    return temperature.reshape(num_heads)


def pointwise_weight(operator: str, name: str, weight: Tensor, in_channels: int | None = None) -> None:
    """Check a (out, in, 1, 1) weight, with ``in_channels`` inputs where given."""
    expected = "in" if in_channels is None else in_channels
    wrong_input = in_channels is not None and tuple(weight.shape[1:2]) != (in_channels,)
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1) or 0 in weight.shape or wrong_input:
        raise ValueError(f"{operator}: {name} must have shape (out, {expected}, 1, 1); got {tuple(weight.shape)}")


def depthwise_weight(
    operator: str, name: str, weight: Tensor, channels: int | None = None, kernel: int | None = None
) -> None:
    """Check a (C, 1, K, K) weight with K odd; of ``channels`` and ``kernel`` where given."""
    expected_shape = f"({channels or 'C'}, 1, {kernel or 'K'}, {kernel or 'K'})" + ("" if kernel else " with K odd")
    size = weight.shape[-1] if weight.dim() == 4 else 0
    good_kernel = size == kernel if kernel else size % 2 == 1
    if not good_kernel or tuple(weight.shape) != (channels or weight.shape[0], 1, size, size) or 0 in weight.shape:
        raise ValueError(f"{operator}: {name} must have shape {expected_shape}; got {tuple(weight.shape)}")


def dense_weight(operator: str, name: str, weight: Tensor, in_channels: int) -> None:
    """Check the (out, in, 3, 3) weight of a dense convolution."""
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (in_channels, 3, 3) or 0 in weight.shape:
        raise ValueError(f"{operator}: {name} must have shape (out, {in_channels}, 3, 3); got {tuple(weight.shape)}")


def linear_weight(operator: str, name: str, weight: Tensor, in_channels: int) -> None:
    """Check the (out, in) weight of a linear layer."""
    if weight.dim() != 2 or weight.shape[1] != in_channels or 0 in weight.shape:
        raise ValueError(f"{operator}: {name} must have shape (out, {in_channels}); got {tuple(weight.shape)}")


def biases(operator: str, **of_projections: tuple[Tensor | None, int]) -> None:
    """Check the biases of projections, which may be None, by the number of their outputs."""
    for name, (bias, outputs) in of_projections.items():
        if bias is not None:
            shape(operator, f"{name}_bias", bias, (outputs,))


def pair(operator: str, name: str, value: object, least: int = 1) -> list[int]:
    """An int or two of them, (rows, columns), as a list of two."""
    values: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(values) != 2 or any(isinstance(each, bool) or not isinstance(each, int) for each in values):
        raise TypeError(f"{operator}: {name} must be an int or a pair of ints; got {value!r}")
    if not all(least <= each < 2**63 for each in values):
        raise ValueError(f"{operator}: {name} must be at least {least} and below 2**63; got {value}")
    return values


def finite_number(operator: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: {name} must be a number; got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{operator}: {name} must be finite; got {value}")
