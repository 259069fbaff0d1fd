"""Global grid self-attention (IPT-V2, section 3.4, equation 4)."""

import torch
from torch import Tensor

from ._precision import in_full_precision
from ._windows import pad_to_multiple


def relative_position_index(grid_size: int, device: torch.device | None = None) -> Tensor:
    """(g², g²) rows of the (2g-1)² bias table: Swin's index of the offset from each key to each query."""
    position = torch.arange(grid_size, device=device)
    offset = position[:, None] - position[None, :] + grid_size - 1  # (query, key) along one axis
    index = offset[:, None, :, None] * (2 * grid_size - 1) + offset[None, :, None, :]
    return index.reshape(grid_size**2, grid_size**2)


def lattice(x: Tensor, heads: int, grid_size: int) -> Tensor:
    """(B, C, H, W), sizes divisible by g -> (B, H/g, W/g, heads, g², C/heads): one group per pixel of a cubby."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, heads, channels // heads, grid_size, height // grid_size, grid_size, width // grid_size)
    return x.permute(0, 4, 6, 1, 3, 5, 2).flatten(4, 5)


@in_full_precision
def grid_attention(qkv: Tensor, bias_table: Tensor | None = None, *, num_heads: int, grid_size: int) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + B) v over the g² pixels at one position inside the g x g cubbies of the map.

    Sizes that g does not divide are padded at the bottom and right to the full lattice; a padded token is masked as a
    key and dropped as a query.
    """
    height, width = qkv.shape[-2:]
    qkv = pad_to_multiple(qkv, grid_size, grid_size)
    batch, channels, rows, columns = qkv.shape

    q, k, v = (lattice(t, num_heads, grid_size) for t in qkv.chunk(3, dim=1))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias_table is not None:
        scores = scores + bias_table[relative_position_index(grid_size, qkv.device)].permute(2, 0, 1)
    # An exported graph serves sizes of both kinds.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or (rows, columns) != (height, width):
        inside = torch.ones(1, 1, height, width, dtype=torch.bool, device=qkv.device)
        inside = lattice(pad_to_multiple(inside, grid_size, grid_size), 1, grid_size)
        scores = scores.masked_fill(~inside.transpose(-2, -1), float("-inf"))
    out = scores.softmax(-1) @ v

    out = out.unflatten(4, (grid_size, grid_size)).permute(0, 3, 6, 4, 1, 5, 2)
    return out.reshape(batch, channels // 3, rows, columns)[..., :height, :width]
