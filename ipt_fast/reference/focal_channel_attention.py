"""Focal context self-attention (IPT-V2, section 3.3, equations 2 and 3)."""

import torch
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
) -> Tensor:
    """w_top * F_top + w_bottom * F_bottom: channel attention in windows and in cyclically shifted windows.

    Each branch is softmax(Q̂ K̂ᵀ / α) V with Q̂, K̂ the normalised w_t Q, w_t K; α is ``temperature``. The map is
    zero-padded at the bottom and right to whole windows; both merge weights are laid out by the unshifted windows.
    """
    height, width = qkv.shape[-2:]
    qkv = pad_to_multiple(qkv, window_size, window_size)
    shift = window_size // 2
    weight = token_weight.reshape(num_heads, 1, window_size**2)

    def branch(qkv: Tensor) -> Tensor:
        q, k, v = (partition(t, num_heads, window_size) for t in qkv.chunk(3, dim=1))
        return reverse(attend(weight * q, weight * k, v, 1 / temperature), window_size)

    def spread(merge_weight: Tensor) -> Tensor:
        _, channels, rows, columns = top.shape
        merge_weight = merge_weight.repeat_interleave(channels // num_heads, dim=0)
        return merge_weight.repeat(1, rows // window_size, columns // window_size)

    top = branch(qkv)
    bottom = torch.roll(branch(torch.roll(qkv, (-shift, -shift), (2, 3))), (shift, shift), (2, 3))
    return (spread(top_weight) * top + spread(bottom_weight) * bottom)[..., :height, :width]
