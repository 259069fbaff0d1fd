"""Self-attention in windows: plain, shifted, rectangular, overlapping, and with fewer keys than queries."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._precision import in_full_precision
from ._windows import normalize, pair

# Swin's windows (Liu et al., ICCV 2021, section 3.2) and those of the restoration models that came after it: SwinIR,
# HAT (overlapping keys), SRFormer (fewer keys), Swin2SR (cosine attention), DAT (rectangular windows).


def relative_position_index(
    window: tuple[int, int], keys: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """(Nq, Nk) rows of a bias table of (wh + kh - 1) (ww + kw - 1) rows: the offset from each key to each query."""

    def offsets(queries: int, keys: int) -> Tensor:
        positions = torch.arange(max(queries, keys), device=device)
        return positions[:queries, None] - positions[None, :keys] + keys - 1

    index = offsets(window[0], keys[0])[:, None, :, None] * (window[1] + keys[1] - 1)
    index = index + offsets(window[1], keys[1])[None, :, None, :]
    return index.reshape(window[0] * window[1], keys[0] * keys[1])


def dense_bias(bias: Tensor, window: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """(heads, Nq, Nk) biases, of a table (rows, heads) or as they are."""
    return bias if bias.dim() == 3 else bias[relative_position_index(window, keys, bias.device)].permute(2, 0, 1)


def _starts(size: int, window: int, shift: int) -> tuple[int, int]:
    """(pixels before the map that the first window holds, number of windows) of one axis."""
    before = (window - shift) % window
    return before, -(-(size + before) // window)


def windows(x: Tensor, heads: int, size: tuple[int, int], shift: tuple[int, int], margin: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, windows down, windows across, heads, tokens, C/heads), zeros beyond the border.

    Windows begin at ``shift``, and there is one before it; with a margin, tokens around each window belong to it, too.
    """
    batch, channels, height, width = x.shape
    (top, down), (left, across) = (_starts(*axis) for axis in zip((height, width), size, shift, strict=True))
    right, below = across * size[1] - left - width, down * size[0] - top - height
    x = F.pad(x, (left + margin[1], right + margin[1], top + margin[0], below + margin[0]))
    x = x.unfold(2, size[0] + 2 * margin[0], size[0]).unfold(3, size[1] + 2 * margin[1], size[1])
    tokens = (size[0] + 2 * margin[0]) * (size[1] + 2 * margin[1])
    x = x.reshape(batch, heads, channels // heads, down, across, tokens)
    return x.permute(0, 3, 4, 1, 5, 2)


@in_full_precision
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
    *,
    num_heads: int,
    window_size: int | Sequence[int],
    key_size: int | Sequence[int] | None = None,
    shift: int | Sequence[int] = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q kᵀ + B) v in windows; with a temperature, one a head, softmax(temperature q̂ k̂ᵀ + B) v.

    Windows of ``window_size`` begin at ``shift``; what is cut off by the border is a window with fewer pixels. Where
    ``key_size`` is larger than the window, the keys are those of the window and of a margin around it, and beyond the
    border lie keys and values of zeros. Where the map of keys is smaller by a factor, so are its windows.
    """
    batch, channels, height, width = q.shape
    window, start = pair(window_size), pair(shift)
    reduction = height // k.shape[2]
    inner = (window[0] // reduction, window[1] // reduction)
    key_window = inner if key_size is None else pair(key_size)
    margin = ((key_window[0] - inner[0]) // 2, (key_window[1] - inner[1]) // 2)
    own = (num_heads, window, start, (0, 0))
    of_keys = (num_heads, inner, (start[0] // reduction, start[1] // reduction), margin)

    queries, keys, values = windows(q, *own), windows(k, *of_keys), windows(v, *of_keys)
    if temperature is None:
        scores = queries @ keys.transpose(-2, -1) * (queries.shape[-1] ** -0.5 if scale is None else scale)
    else:
        scores = normalize(queries) @ normalize(keys).transpose(-2, -1)
        scores = scores * temperature.reshape(-1, 1, 1)
    if bias is not None:
        scores = scores + dense_bias(bias, window, key_window)
    if margin == (0, 0):
        inside = windows(torch.ones(1, 1, *k.shape[2:], device=q.device), 1, *of_keys[1:]) > 0
        scores = scores.masked_fill(~inside.transpose(-2, -1), float("-inf"))
        # Queries beyond the border may have no key at all; they are dropped.
        scores = scores.masked_fill(~inside.any(-2, keepdim=True), 0)
    out = scores.softmax(-1) @ values

    (top, _), (left, _) = (_starts(*axis) for axis in zip((height, width), window, start, strict=True))
    out = out.unflatten(4, window).permute(0, 3, 6, 1, 4, 2, 5)
    out = out.reshape(batch, channels, out.shape[3] * out.shape[4], out.shape[5] * out.shape[6])
    return out[..., top : top + height, left : left + width]
