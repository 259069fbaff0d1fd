"""Channel attention of whole images, windows and dilated groups."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from . import _check, _cpu, _triton
from ._operator import Operator, Shape


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    num_heads: int,
    window_size: int | Sequence[int] | None = None,
    dilation: int | None = None,
    overlapping: bool = False,
) -> Tensor:
    """softmax(temperature * q̂ k̂ᵀ) v over the channels of each head (Restormer, Zamir et al., CVPR 2022, eq. 1).

    q̂ and k̂ are q and k with every channel L2-normalised over the pixels of its group: the whole image, each window, or
    the pixels that a dilation puts together. Windows that reach over the bottom and right border are windows with fewer
    pixels. A group of zeros gives zeros.

    Args:
        q, k, v: (B, C, H, W), any floating dtype and strides; views of one map of q, k and v along the channels are not
            copied where that map is channels-last.
        temperature: (heads,) or (heads, 1, 1), multiplied; dtype of ``q`` or float32.
        num_heads: number of heads; head i holds the channels i*C/heads to (i+1)*C/heads.
        window_size: (rows, columns) of the windows in pixels, or one number for both; None for the whole image.
        dilation: groups are the pixels whose rows and columns are equal modulo this number; None for no such groups.
        overlapping: windows of ``window_size``, or of the whole axis where it is shorter, are spread evenly, so that
            the first and the last touch the borders, and results are averaged where windows overlap (test-time local
            converter, TLC, Chu et al., ECCV 2022).

    Returns:
        (B, C, H, W), dtype of ``q`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _operator.check_tensors(q, k, v, temperature)
    _check.heads_divide("channel_attention", q.shape[1], num_heads)
    for name, value in (("k", k), ("v", v)):
        _check.shape("channel_attention", name, value, tuple(q.shape))
    temperature = _check.per_head("channel_attention", "temperature", temperature, num_heads)
    window = check_groups("channel_attention", window_size, dilation, overlapping)
    return _operator(q, k, v, temperature, num_heads, window, dilation, overlapping)


def check_groups(operator: str, window_size: Any, dilation: Any, overlapping: Any) -> list[int] | None:
    """Check what says which pixels are a group; returns the size of windows, rows and columns."""
    window = None if window_size is None else _check.pair(operator, "window_size", window_size)
    _check.flag(operator, "overlapping", overlapping)
    if dilation is not None:
        _check.positive_int(operator, "dilation", dilation)
        if window is not None:
            raise ValueError(f"{operator}: dilation must be None beside window_size; got {dilation}")
    if overlapping and window is None:
        raise ValueError(f"{operator}: overlapping must be False where there is no window_size")
    return window


def _flops(q: Shape, k: Shape, v: Shape, temperature: Shape, num_heads: int, *groups: Any) -> int:
    batch, channels, height, width = q
    return 2 * 2 * batch * height * width * channels * (channels // num_heads)


_operator = Operator(
    channel_attention,
    "Tensor q, Tensor k, Tensor v, Tensor temperature, int num_heads, int[2]? window_size, int? dilation, "
    "bool overlapping",
    reference.channel_attention,
    images=("q", "k", "v"),
    output_shape=lambda q, *_: q.shape,
    flops=_flops,
)
_cpu.register(_operator)
_triton.register(_operator, lambda q, num_heads: _triton.head_limit(q.shape[1], num_heads), views=True)
