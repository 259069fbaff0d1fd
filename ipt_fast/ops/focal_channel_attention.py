"""Focal context self-attention of IPT-V2."""

from typing import Any

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
    cyclic: bool = True,
) -> Tensor:
    """Channel attention in windows and in cyclically shifted windows, merged (IPT-V2, section 3.3, eq. 2 and 3).

    In each window and head A = softmax(Q̂ K̂ᵀ / α), F = A V, where Q̂ and K̂ are w_t Q and w_t K with every channel
    L2-normalised over the window. The second branch works on windows shifted by (-p//2, -p//2), as Swin's, without a
    mask. The result is w_top F_top + w_bottom F_bottom by position in the unshifted window. Any H and W: the map is
    taken as zero-padded at the bottom and right to whole windows. A window of zeros gives zeros.

    ``cyclic=False`` is the reading that the authors released later (U-DiT, utils/udit_models_original.py): the windows
    of the second branch lie in the interior of the padded map, which begins p/2 pixels from its edges. In the border,
    and everywhere on a map that is one window high or wide, the result is F_top.

    Args:
        qkv: (B, 3C, H, W), q, k and v along the channels; any floating dtype and strides.
        temperature: α, (heads,) or (heads, 1, 1), divides; dtype of ``qkv`` or float32, as the three maps. Or
            (2, heads), one for each branch.
        token_weight: w_t, (heads, p, p), or (2, heads, p, p), one for each branch; by position in its own window.
        top_weight, bottom_weight: w_top and w_bottom, (heads, p, p).
        num_heads: number of heads; head i holds the channels i*C/heads to (i+1)*C/heads.
        window_size: p, side of the windows in pixels; even where the shift is not cyclic.
        cyclic: the shifted windows reach over the edges of the map.

    Returns:
        (B, C, H, W), dtype of ``qkv`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "focal_channel_attention"
    _operator.check_tensors(qkv, temperature, token_weight, top_weight, bottom_weight)
    _check.packed_qkv(name, qkv, num_heads)
    focal = (temperature, token_weight, top_weight, bottom_weight)
    return _operator(
        qkv, *focal_parameters(name, *focal, num_heads, window_size, cyclic), num_heads, window_size, cyclic
    )


def focal_parameters(
    operator: str,
    temperature: Tensor,
    token_weight: Tensor,
    top_weight: Tensor,
    bottom_weight: Tensor,
    num_heads: int,
    window_size: int,
    cyclic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check the parameters of both branches; returns them, the temperature as (heads,) or (2, heads)."""
    _check.positive_int(operator, "window_size", window_size)
    _check.flag(operator, "cyclic", cyclic)
    if not cyclic and window_size % 2:
        raise ValueError(f"{operator}: window_size must be even where cyclic is False; got {window_size}")
    shapes = (num_heads,), (num_heads, 1, 1), (2, num_heads)
    _check.shape(operator, "temperature", temperature, *shapes)
    if temperature.dim() == 3:
        temperature = temperature.reshape(num_heads)
    one = (num_heads, window_size, window_size)
    _check.shape(operator, "token_weight", token_weight, one, (2, *one))
    _check.shape(operator, "top_weight", top_weight, one)
    _check.shape(operator, "bottom_weight", bottom_weight, one)
    return temperature, token_weight, top_weight, bottom_weight


def one_for_both(temperature: Tensor, token_weight: Tensor) -> str | None:
    """None, or why kernels whose branches share these parameters do not take them."""
    if temperature.dim() == 1 and token_weight.dim() == 3:
        return None
    return "these kernels take a temperature and a token_weight that both branches share"


def _flops(
    qkv: Shape,
    temperature: Shape,
    token_weight: Shape,
    top_weight: Shape,
    bottom_weight: Shape,
    num_heads: int,
    *others: Any,
) -> int:
    batch, packed, height, width = qkv
    channels = packed // 3
    return 2 * 4 * batch * height * width * channels * (channels // num_heads)


_operator = Operator(
    focal_channel_attention,
    "Tensor qkv, Tensor temperature, Tensor token_weight, Tensor top_weight, Tensor bottom_weight, "
    "int num_heads, int window_size, bool cyclic",
    reference.focal_channel_attention,
    images=("qkv",),
    output_shape=lambda qkv, *_: (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]),
    flops=_flops,
)
_cpu.register(_operator)
_triton.register(_operator, lambda qkv, num_heads: _triton.head_limit(qkv.shape[1] // 3, num_heads))
