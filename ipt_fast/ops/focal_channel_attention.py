"""Focal context self-attention of IPT-V2."""

from torch import Tensor

from .. import reference
from . import _check, _cpu, _triton
from ._operator import Operator, Shape


def focal_channel_attention(
    qkv: Tensor,
    temperature: Tensor,
    token_weight: Tensor,
    top_weight: Tensor,
    bottom_weight: Tensor,
    *,
    num_heads: int,
    window_size: int,
) -> Tensor:
    """Channel attention in windows and in cyclically shifted windows, merged (IPT-V2, section 3.3, eq. 2 and 3).

    In each window and head A = softmax(Q̂ K̂ᵀ / α), F = A V, where Q̂ and K̂ are w_t Q and w_t K with every channel
    L2-normalised over the window. The second branch works on windows shifted by (-p//2, -p//2), as Swin's, without a
    mask. The result is w_top F_top + w_bottom F_bottom by position in the unshifted window. Any H and W: the map is
    taken as zero-padded at the bottom and right to whole windows. A window of zeros gives zeros.

    Args:
        qkv: (B, 3C, H, W), q, k and v along the channels; any floating dtype and strides.
        temperature: α, (heads,) or (heads, 1, 1), divides; dtype of ``qkv`` or float32, as the three maps.
        token_weight: w_t, (heads, p, p).
        top_weight, bottom_weight: w_top and w_bottom, (heads, p, p).
        num_heads: number of heads; head i holds the channels i*C/heads to (i+1)*C/heads.
        window_size: p, side of the windows in pixels.

    Returns:
        (B, C, H, W), dtype of ``qkv`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "focal_channel_attention"
    _operator.check_tensors(qkv, temperature, token_weight, top_weight, bottom_weight)
    _check.packed_qkv(name, qkv, num_heads)
    _check.positive_int(name, "window_size", window_size)
    temperature = _check.per_head(name, "temperature", temperature, num_heads)
    maps = {"token_weight": token_weight, "top_weight": top_weight, "bottom_weight": bottom_weight}
    for map_name, value in maps.items():
        _check.shape(name, map_name, value, (num_heads, window_size, window_size))
    return _operator(qkv, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size)


def _flops(
    qkv: Shape,
    temperature: Shape,
    token_weight: Shape,
    top_weight: Shape,
    bottom_weight: Shape,
    num_heads: int,
    window_size: int,
) -> int:
    batch, packed, height, width = qkv
    channels = packed // 3
    return 2 * 4 * batch * height * width * channels * (channels // num_heads)


_operator = Operator(
    focal_channel_attention,
    "Tensor qkv, Tensor temperature, Tensor token_weight, Tensor top_weight, Tensor bottom_weight, "
    "int num_heads, int window_size",
    reference.focal_channel_attention,
    images=("qkv",),
    output_shape=lambda qkv, *_: (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]),
    flops=_flops,
)
_cpu.register(_operator)
_triton.register(_operator, lambda qkv, num_heads: _triton.head_limit(qkv.shape[1] // 3, num_heads))
