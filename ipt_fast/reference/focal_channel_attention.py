"""Focal context self-attention (IPT-V2, section 3.3, equations 2 and 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from ._windows import pad_to_multiple, partition, reverse
from .channel_attention import attend


@in_full_precision
def focal_channel_attention(
    qkv: Tensor,
    temperature: Tensor,
    token_weight: Tensor,
    top_weight: Tensor,
    bottom_weight: Tensor,
    *,
    num_heads: int,
    window_size: int,
    cyclic: bool = True,
) -> Tensor:
    """w_top * F_top + w_bottom * F_bottom: channel attention in windows and in windows shifted by half of one.

    Each branch is softmax(Q̂ K̂ᵀ / α) V with Q̂, K̂ the normalised w_t Q, w_t K; α is ``temperature``. Both have one for
    each branch where their first axis says so. The map is zero-padded at the bottom and right to whole windows; both
    merge weights are laid out by the unshifted windows. The shift is cyclic, or else the shifted windows lie in the
    interior, and the result is F_top in the border of half a window, and on a map of one window along an axis.
    """
    height, width = qkv.shape[-2:]
    qkv = pad_to_multiple(qkv, window_size, window_size)
    shift = window_size // 2
    alphas = temperature.reshape(-1, num_heads)
    weights = token_weight.reshape(-1, num_heads, 1, window_size**2)

    def branch(qkv: Tensor, index: int) -> Tensor:
        q, k, v = (partition(t, num_heads, window_size) for t in qkv.chunk(3, dim=1))
        return reverse(attend(weights[index] * q, weights[index] * k, v, 1 / alphas[index]), window_size)

    def spread(merge_weight: Tensor) -> Tensor:
        _, channels, rows, columns = top.shape
        merge_weight = merge_weight.repeat_interleave(channels // num_heads, dim=0)
        return merge_weight.repeat(1, rows // window_size, columns // window_size)

    top = branch(qkv, 0)
    if cyclic:
        bottom = torch.roll(branch(torch.roll(qkv, (-shift, -shift), (2, 3)), -1), (shift, shift), (2, 3))
        merged = spread(top_weight) * top + spread(bottom_weight) * bottom
    elif min(top.shape[2:]) == window_size:
        merged = top
    else:
        inside = slice(shift, -shift)
        bottom = branch(qkv[..., inside, inside], -1)
        inner = spread(top_weight)[..., inside, inside] * top[..., inside, inside]
        inner = inner + spread(bottom_weight)[..., inside, inside] * bottom
        interior = F.pad(torch.ones_like(inner, dtype=torch.bool), (shift,) * 4)
        merged = torch.where(interior, F.pad(inner, (shift,) * 4), top)
    return merged[..., :height, :width]
