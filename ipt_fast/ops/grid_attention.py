"""Global grid self-attention of IPT-V2."""

from torch import Tensor

from .. import reference
from . import _check, _cpu, _triton
from ._operator import Operator, Shape


def grid_attention(qkv: Tensor, bias_table: Tensor | None = None, *, num_heads: int, grid_size: int) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + B) v on dilated g x g lattices over the whole image (IPT-V2, section 3.4, eq. 4).

    The map is cut into g x g cubbies of ⌈H/g⌉ x ⌈W/g⌉ pixels; the pixels at one position inside their cubbies form one
    group, in raster order over the cubbies. B is Swin's relative position bias. Any H and W: lattice points beyond the
    border do not take part.

    Args:
        qkv: (B, 3C, H, W), q, k and v along the channels; any floating dtype and strides.
        bias_table: ((2g-1)², heads) or None, dtype of ``qkv`` or float32; row
            (a_query - a_key + g-1) (2g-1) + (b_query - b_key + g-1) for cubby row a and column b.
        num_heads: number of heads; head i holds the channels i*C/heads to (i+1)*C/heads.
        grid_size: g, cubbies along each axis.

    Returns:
        (B, C, H, W), dtype of ``qkv`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    _operator.check_tensors(qkv, bias_table)
    _check.packed_qkv("grid_attention", qkv, num_heads)
    _check.positive_int("grid_attention", "grid_size", grid_size)
    if bias_table is not None:
        _check.shape("grid_attention", "bias_table", bias_table, ((2 * grid_size - 1) ** 2, num_heads))
    return _operator(qkv, bias_table, num_heads, grid_size)


def squared_tokens(size: int, grid_size: int) -> int:
    """Sum over the positions in a cubby of the squared number of lattice points inside one axis of ``size``."""
    cubby = -(-size // grid_size)
    full, rest = divmod(size, cubby)
    return rest * (full + 1) ** 2 + (cubby - rest) * full**2


def _flops(qkv: Shape, bias_table: Shape | None, num_heads: int, grid_size: int) -> int:
    batch, packed, height, width = qkv
    return 2 * 2 * batch * packed // 3 * squared_tokens(height, grid_size) * squared_tokens(width, grid_size)


_operator = Operator(
    grid_attention,
    "Tensor qkv, Tensor? bias_table, int num_heads, int grid_size",
    reference.grid_attention,
    images=("qkv",),
    output_shape=lambda qkv, *_: (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]),
    flops=_flops,
)
_cpu.register(_operator)
_triton.register(_operator, lambda qkv, num_heads: _triton.head_limit(qkv.shape[1] // 3, num_heads))
