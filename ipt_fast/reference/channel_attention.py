"""Channel attention of whole images and of windows (Restormer, Zamir et al., CVPR 2022, section 3.1)."""

import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from ._windows import pad_to_multiple, partition, reverse


def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """softmax(scale * q̂ k̂ᵀ) v for (..., heads, d, tokens), each channel of q and k normalised over its tokens."""
    attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (attention * scale.reshape(-1, 1, 1)).softmax(-1) @ v


@in_full_precision
def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, num_heads: int, window_size: int | None = None
) -> Tensor:
    """softmax(temperature * q̂ k̂ᵀ) v over the channels of a head, for the whole image or in windows of p x p.

    Windows that reach over the border are filled with zeros, which change neither the products nor the norms.
    """
    batch, channels, height, width = q.shape
    if window_size is None:
        q, k, v = (t.reshape(batch, num_heads, channels // num_heads, height * width) for t in (q, k, v))
        return attend(q, k, v, temperature).reshape(batch, channels, height, width)
    q, k, v = (partition(pad_to_multiple(t, window_size, window_size), num_heads, window_size) for t in (q, k, v))
    return reverse(attend(q, k, v, temperature), window_size)[..., :height, :width]
