"""What the kernels of grid attention and of its layer share: pixels of a group, scores, softmax.

A group is a dilated lattice of LATTICE x LATTICE pixels; a token is one of its points, in raster order. Points beyond
the border are absent: neither key nor query. Scores are kept times log2(e), for exp2.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._launch import block_of, cdiv, key_of, power_of_2, precision

# Of the image: kernels are not compiled anew for them.
SIZES = ["groups", "count", "height", "width", "row_step", "column_step"]
LOG2E = tl.constexpr(1.4426950408889634)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The groups of a map and the constants of its kernels; ``channels`` are those of all heads together."""

    groups: int
    steps: tuple  # height, width of the map; rows, columns of a cubby
    side: int  # of the square bias table
    lattice: int
    channels: int
    heads: int

    @property
    def depth(self):
        return self.channels // self.heads

    @property
    def tokens(self):
        return self.lattice**2

    @property
    def rows(self):
        """Lattice points of all groups, absent ones included."""
        return self.groups * self.tokens

    def constants(self, x):
        return dict(
            HEADS=self.heads, D=self.depth, LATTICE=self.lattice, SIDE=self.side, PRECISION=precision(x),
            BLOCK_D=block_of(self.depth),
        )  # fmt: skip

    def key(self, x, table):
        return key_of(x, self.depth, self.lattice, *(["bias"] if table is not None else []))


def lattice_of(x, channels, heads, grid_size):
    batch, _, height, width = x.shape
    row_step, column_step = cdiv(height, grid_size), cdiv(width, grid_size)
    # A grid finer than the map has one group; then the map's size, rounded so that few kernels are compiled, is enough.
    lattice = min(grid_size, power_of_2(max(height, width)))
    steps = (height, width, row_step, column_step)
    return Lattice(batch * row_step * column_step, steps, 2 * grid_size - 1, lattice, channels, heads)


def is_wide(x, lattice):
    """Whether tiles of (tokens, head width) need to be smaller than usual."""
    return x.dtype == torch.float32 or lattice.depth > 64


@triton.jit
def group_pixels(i_group, o_t, height, width, row_step, column_step, LATTICE: tl.constexpr):
    """Pixels of the tokens ``o_t`` of a group, counted through the batch, and which of them are in the map.

    Groups are in raster order over the positions in a cubby of row_step x column_step pixels, image by image. Tokens
    from LATTICE² on lie below the map.
    """
    i_row = i_group // column_step
    o_y = i_row % row_step + o_t // LATTICE * row_step
    o_x = i_group % column_step + o_t % LATTICE * column_step
    o_pixel = (i_row // row_step * height + o_y).to(tl.int64) * width + o_x
    return o_pixel, (o_y < height) & (o_x < width)


@triton.jit
def bias_offsets(o_t, LATTICE: tl.constexpr, SIDE: tl.constexpr):
    """A query's less a key's, plus SIDE² // 2, is their row of the table; for tokens from LATTICE² on a valid one."""
    o_t = tl.minimum(o_t, LATTICE * LATTICE - 1)
    return o_t // LATTICE * SIDE + o_t % LATTICE


@triton.jit
def biases(table, o_bias):
    """Biases of scores at places of the table, or none."""
    if table is None:
        return 0.0
    else:
        return tl.load(table + o_bias).to(tl.float32) * LOG2E


@triton.jit
def masked_scores(b_rows, b_columns, b_bias, m_s, scale, PRECISION: tl.constexpr):
    """Scores of queries and keys, in either order, of which ``b_bias`` is a part: -inf where not ``m_s``."""
    b_s = dot(b_rows, tl.trans(b_columns), None, PRECISION) * (scale * LOG2E) + b_bias
    return tl.where(m_s, b_s, float("-inf"))


@triton.jit
def finite_shift(b_max):
    """What to subtract from scores; nothing where there is no key, as biases of -inf may make it."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def as_operand(b_x, dtype: tl.constexpr):
    """``b_x`` in ``dtype``, divided by a factor, and the factor: above 1 where fp16 would not hold it."""
    if dtype == tl.float16:
        b_factor = tl.maximum(tl.max(tl.max(tl.abs(b_x), axis=1), axis=0) / 32768.0, 1.0)
        return (b_x / b_factor).to(dtype), b_factor
    else:
        return b_x.to(dtype), 1.0
