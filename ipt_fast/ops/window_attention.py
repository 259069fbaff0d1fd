"""Self-attention in windows."""

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from . import _check, _cpu, _triton
from ._operator import Operator, Shape


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
    """softmax(scale q kᵀ + B) v in windows (Swin Transformer, Liu et al., ICCV 2021, eq. 4).

    Windows begin at ``shift``, and what lies before it, or is cut off by the border, is a window with fewer pixels:
    that is Swin's shifted partition with its mask, without a cyclic shift. The keys of a window may be more pixels than
    its queries, those of a margin around it, too (HAT's overlapping windows): beyond the border lie keys and values of
    zeros. Or they may be fewer, from a smaller map (SRFormer).

    Args:
        q: (B, C, H, W), any floating dtype and strides; views of one map of q, k and v along the channels are not
            copied where that map is channels-last.
        k, v: as ``q``, or (B, C, H/r, W/r), where r divides H, W, ``window_size`` and ``shift``.
        bias: B, a table ((wh + kh - 1) (ww + kw - 1), heads) of relative positions, whose row of a query (a, b) and a
            key (c, d) of their windows is (a - c + kh - 1) (ww + kw - 1) + b - d + kw - 1; or dense, (heads, wh ww,
            kh kw); dtype of ``q`` or float32.
        temperature: (heads,) or (heads, 1, 1), multiplied, for cosine attention softmax(temperature q̂ k̂ᵀ + B) v, in
            which each token's q and k of a head are L2-normalised (Swin V2, eq. 2).
        num_heads: number of heads; head i holds the channels i*C/heads to (i+1)*C/heads.
        window_size: (wh, ww) pixels of a window, or one number for both.
        key_size: (kh, kw), by default as large as a window on the map of the keys. Larger by an even number, and then
            without shift, where windows of keys overlap.
        shift: (rows, columns) where the first whole window begins, from 0 to below ``window_size``.
        scale: of the scores, by default 1 / sqrt(C / heads); not beside ``temperature``.

    Returns:
        (B, C, H, W), dtype of ``q`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "window_attention"
    _operator.check_tensors(q, k, v, bias, temperature)
    batch, channels, height, width = q.shape
    _check.heads_divide(name, channels, num_heads)
    window, start = _check.pair(name, "window_size", window_size), _check.pair(name, "shift", shift, 0)
    check_shift(name, window, start)
    reduction = height // k.shape[2] if k.shape[2] else 0
    if k.shape[:2] != q.shape[:2] or not reduction or list(k.shape[2:]) != [height // reduction, width // reduction]:
        raise ValueError(
            f"{name}: k must have shape (B, C, H/r, W/r) beside q of {tuple(q.shape)}; got {tuple(k.shape)}"
        )
    if reduction > 1 and any(size % reduction for size in (height, width, *window, *start)):
        raise ValueError(f"{name}: k is smaller by {reduction}, which must divide H, W, window_size and shift")
    _check.shape(name, "v", v, tuple(k.shape))
    inner = [size // reduction for size in window]
    keys = inner if key_size is None else _check.pair(name, "key_size", key_size)
    margins = [key - size for key, size in zip(keys, inner, strict=True)]
    if any(margin < 0 or margin % 2 for margin in margins):
        raise ValueError(f"{name}: key_size must be {tuple(inner)}, or larger by even numbers; got {tuple(keys)}")
    if any(margins) and (reduction > 1 or any(start)):
        raise ValueError(f"{name}: key_size must be {tuple(inner)} with a shift or a smaller k; got {tuple(keys)}")
    check_bias(name, bias, num_heads, window, keys)
    if temperature is not None:
        temperature = _check.per_head(name, "temperature", temperature, num_heads)
        if scale is not None:
            raise ValueError(f"{name}: scale must be None beside temperature; got {scale}")
    scale = default_scale(name, scale, channels // num_heads)
    return _operator(q, k, v, bias, temperature, num_heads, window, keys, start, scale)


def check_shift(operator: str, window: Sequence[int], shift: Sequence[int]) -> None:
    if any(start >= size for start, size in zip(shift, window, strict=True)):
        raise ValueError(f"{operator}: shift must be smaller than window_size {tuple(window)}; got {tuple(shift)}")


def check_bias(operator: str, bias: Tensor | None, heads: int, window: Sequence[int], keys: Sequence[int]) -> None:
    if bias is not None:
        rows = (window[0] + keys[0] - 1) * (window[1] + keys[1] - 1)
        dense = (heads, window[0] * window[1], keys[0] * keys[1])
        _check.shape(operator, "bias", bias, (rows, heads), dense)


def default_scale(operator: str, scale: float | None, depth: int) -> float:
    if scale is None:
        return depth**-0.5
    _check.finite_number(operator, "scale", scale)
    return float(scale)


def squared_tokens(size: int, window: int, shift: int) -> int:
    """Sum over the windows of one axis of the squared number of their pixels."""
    first = min(shift, size)
    full, rest = divmod(size - first, window)
    return first**2 + full * window**2 + rest**2


def _flops(
    q: Shape,
    k: Shape,
    v: Shape,
    bias: Shape | None,
    temperature: Shape | None,
    num_heads: int,
    window_size: Sequence[int],
    key_size: Sequence[int],
    shift: Sequence[int],
    scale: float,
) -> int:
    batch, channels, *sizes = q
    pairs = 1
    for size, window, keys, start, of_keys in zip(sizes, window_size, key_size, shift, k[2:], strict=True):
        reduction = size // of_keys
        inside = squared_tokens(size, window, start) // reduction
        pairs *= inside if keys * reduction == window else size * keys
    return 2 * 2 * batch * channels * pairs


_operator = Operator(
    window_attention,
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? temperature, int num_heads, "
    "int[2] window_size, int[2] key_size, int[2] shift, float scale",
    reference.window_attention,
    images=("q", "k", "v"),
    output_shape=lambda q, *_: q.shape,
    flops=_flops,
)
_cpu.register(_operator)
_triton.register(_operator, lambda q, num_heads: _triton.head_limit(q.shape[1], num_heads), views=True)
