"""Channel attention of whole images and of windows."""

from torch import Tensor

from .. import reference
from . import _check, _cpu, _triton
from ._operator import Operator, Shape


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, num_heads: int, window_size: int | None = None
) -> Tensor:
    """softmax(temperature * q̂ k̂ᵀ) v over the channels of each head (Restormer, Zamir et al., CVPR 2022, eq. 1).

    q̂ and k̂ are q and k with every channel L2-normalised over the pixels of its group: the whole image, or each window.
    Windows that reach over the bottom and right border are windows with fewer pixels. A group of zeros gives zeros.

    Args:
        q, k, v: (B, C, H, W), any floating dtype and strides.
        temperature: (heads,) or (heads, 1, 1), multiplied; dtype of ``q`` or float32.
        num_heads: number of heads; head i holds the channels i*C/heads to (i+1)*C/heads.
        window_size: side of the windows in pixels, or None for the whole image.

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
    if window_size is not None:
        _check.positive_int("channel_attention", "window_size", window_size)
    return _operator(q, k, v, temperature, num_heads, window_size)


def _flops(q: Shape, k: Shape, v: Shape, temperature: Shape, num_heads: int, window_size: int | None) -> int:
    batch, channels, height, width = q
    return 2 * 2 * batch * height * width * channels * (channels // num_heads)


_operator = Operator(
    channel_attention,
    "Tensor q, Tensor k, Tensor v, Tensor temperature, int num_heads, int? window_size",
    reference.channel_attention,
    images=("q", "k", "v"),
    output_shape=lambda q, *_: q.shape,
    flops=_flops,
)
_cpu.register(_operator)
_triton.register(_operator, lambda q, num_heads: _triton.head_limit(q.shape[1], num_heads))
