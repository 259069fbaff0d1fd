"""Channel attention of whole images, windows and dilated groups (Restormer, Zamir et al., CVPR 2022, section 3.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from ._windows import normalize, pad_to_multiple, pair


def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """softmax(scale * q̂ k̂ᵀ) v for (..., heads, d, tokens), each channel of q and k normalised over its tokens."""
    attention = normalize(q) @ normalize(k).transpose(-2, -1)
    return (attention * scale.reshape(-1, 1, 1)).softmax(-1) @ v


def window_starts(size: int, window: int) -> list[int]:
    """Where windows begin that are spread evenly over an axis; the last one touches its end (TLC, ECCV 2022)."""
    window = min(size, window)
    rows = -(-size // window)
    step = -(-(size - window) // (rows - 1)) if rows > 1 else 1
    return [min(i * step, size - window) for i in range(rows)]


@in_full_precision
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
    """softmax(temperature * q̂ k̂ᵀ) v over the channels of a head, in groups of pixels.

    A group is the whole image; or a window, where those that reach over the border are filled with zeros, which change
    neither the products nor the norms; or, with a dilation, the pixels whose rows and columns are equal modulo it.
    Overlapping windows lie inside of the image, spread evenly, and where they overlap their results are averaged.
    """
    batch, channels, height, width = q.shape
    heads = (num_heads, channels // num_heads)

    def whole(*maps: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, heads) for t in maps)
        return attend(q, k, v, temperature).reshape(maps[0].shape)

    if dilation is not None:
        padded = [pad_to_multiple(t, dilation, dilation) for t in (q, k, v)]
        groups = [t.unflatten(3, (-1, dilation)).unflatten(2, (-1, dilation)).permute(0, 3, 5, 1, 2, 4) for t in padded]
        out = whole(*(t.flatten(0, 2) for t in groups)).reshape(groups[0].shape).permute(0, 3, 4, 1, 5, 2)
        return out.reshape(padded[0].shape)[..., :height, :width]
    if window_size is None:
        return whole(q, k, v)
    rows, columns = pair(window_size)
    if overlapping:
        out, count = torch.zeros_like(q), torch.zeros_like(q[:1, :1])
        for top in window_starts(height, rows):
            for left in window_starts(width, columns):
                bottom, right = min(top + rows, height), min(left + columns, width)
                window = whole(*(t[..., top:bottom, left:right] for t in (q, k, v)))
                around = (left, width - right, top, height - bottom)
                out, count = out + F.pad(window, around), count + F.pad(torch.ones_like(window[:1, :1]), around)
        return out / count
    padded = [pad_to_multiple(t, rows, columns) for t in (q, k, v)]
    groups = [t.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5) for t in padded]
    out = whole(*(t.flatten(0, 2) for t in groups)).reshape(groups[0].shape).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(padded[0].shape)[..., :height, :width]
