"""What the kernels of spatial attention and of its layers share: pixels of a group, scores, softmax.

A group is a lattice of rows x columns pixels, a token one of its points, in raster order. Lattices are dilated, over
the whole image (grid attention), or of neighbours (windows); those of a group's keys may be other ones than its
queries', with the same middle, and on a smaller map. Points beyond the border are absent: neither key nor query. Where
windows of keys overlap, they are keys and values of zeros instead. Scores are kept times log2(e), for exp2.

Kernels know a lattice by a tuple of constants: rows and columns of tokens; the pixels from group to group, down and
across, 0 of a dilated one; and where in the image the first group begins, down and across.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._launch import block_of, cdiv, key_of, power_of_2, precision

# Of the image: kernels are not compiled anew for them.
SIZES = ["groups", "count", "height", "width", "key_height", "key_width", "down", "across"]
LOG2E = tl.constexpr(1.4426950408889634)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The groups of a map and the constants of its kernels; ``channels`` are those of all heads together."""

    operator: str  # whose measured configurations its kernels take
    groups: int
    steps: tuple  # height, width of the map; of the keys' map; groups down and across
    queries: tuple  # lattices, as kernels know them
    keys: tuple
    table: tuple  # columns of the bias table, its row of a key where the query is; 0, 0 of dense biases
    channels: int
    heads: int
    widths: tuple  # of what configurations depend on, beside those of a head

    @property
    def depth(self):
        return self.channels // self.heads

    @property
    def tokens(self):
        """Queries of a group."""
        return self.queries[0] * self.queries[1]

    @property
    def key_tokens(self):
        return self.keys[0] * self.keys[1]

    @property
    def most(self):
        return max(self.tokens, self.key_tokens)

    @property
    def overlapping(self):
        """Whether pixels are keys of several groups."""
        return self.keys[0] > self.keys[2] > 0 or self.keys[1] > self.keys[3] > 0

    @property
    def scores(self):
        """Of all groups and heads, those of absent points included."""
        return self.groups * self.heads * self.tokens * self.key_tokens

    def constants(self, x):
        return dict(
            HEADS=self.heads, D=self.depth, QUERIES=self.queries, KEYS=self.keys, TABLE=self.table,
            OVERLAPPING=self.overlapping, PRECISION=precision(x), BLOCK_D=block_of(self.depth),
        )  # fmt: skip

    def constants_of_layer(self, x):
        """Where queries and keys are the same tokens."""
        return dict(
            HEADS=self.heads, D=self.depth, LATTICE=self.queries, TABLE=self.table, PRECISION=precision(x),
            BLOCK_D=block_of(self.depth),
        )  # fmt: skip

    def key(self, x, bias, temperature=None):
        parts = ["bias"] if bias is not None else []
        parts += ["cosine"] if temperature is not None else []
        return key_of(x, self.depth, *self.widths, *parts)


def grid_lattice(x, channels, heads, grid_size):
    batch, _, height, width = x.shape
    down, across = cdiv(height, grid_size), cdiv(width, grid_size)
    # A grid finer than the map has one group; then the map's size, rounded so that few kernels are compiled, is enough.
    side = min(grid_size, power_of_2(max(height, width)))
    lattice = (side, side, 0, 0, 0, 0)
    columns = 2 * grid_size - 1
    return Lattice(
        "grid_attention", batch * down * across, (height, width, height, width, down, across), lattice, lattice,
        (columns, columns * columns // 2), channels, heads, (side,),
    )  # fmt: skip


def window_lattice(q, k, bias, channels, heads, window, key_size, shift):
    """Of maps ``q`` and ``k``, the latter of which may be smaller by a factor; ``bias``: None, a table or dense."""
    batch, _, *sizes = q.shape
    of_keys = list(k.shape[2:])
    before = [-start % size for size, start in zip(window, shift, strict=True)]  # pixels before the map in a window
    counts = [cdiv(size + first, side) for size, first, side in zip(sizes, before, window, strict=True)]
    reduction = sizes[0] // of_keys[0] if of_keys[0] else 1
    inner = [side // reduction for side in window]
    margins = [(keys - side) // 2 for keys, side in zip(key_size, inner, strict=True)]
    begin = [-first // reduction - margin for first, margin in zip(before, margins, strict=True)]
    columns = window[1] + key_size[1] - 1
    dense = bias is not None and bias.dim() == 3
    return Lattice(
        "window_attention", batch * counts[0] * counts[1], (*sizes, *of_keys, *counts),
        (*window, *window, *(-first for first in before)), (*key_size, *inner, *begin),
        (0, 0) if dense else (columns, (key_size[0] - 1) * columns + key_size[1] - 1), channels, heads,
        ("x".join(map(str, window)), "x".join(map(str, key_size))),
    )  # fmt: skip


def is_wide(x, lattice):
    """Whether tiles of (tokens, head width) need to be smaller than usual."""
    return x.dtype == torch.float32 or lattice.depth > 64


@triton.jit
def group_pixels(i_group, o_t, height, width, down, across, LATTICE: tl.constexpr):
    """Pixels of the tokens ``o_t`` of a group, counted through the batch, and which of them are in the map.

    Groups are in raster order, image by image: over the windows, or over the positions in a cubby of down x across
    pixels. Tokens from rows * columns on are not in the map.
    """
    i_row = i_group // across
    if LATTICE[2] == 0:
        o_y = i_row % down + o_t // LATTICE[1] * down
        o_x = i_group % across + o_t % LATTICE[1] * across
        m_t = (o_y < height) & (o_x < width)
    else:
        o_y = i_row % down * LATTICE[2] + LATTICE[4] + o_t // LATTICE[1]
        o_x = i_group % across * LATTICE[3] + LATTICE[5] + o_t % LATTICE[1]
        m_t = (o_t < LATTICE[0] * LATTICE[1]) & (o_y >= 0) & (o_y < height) & (o_x >= 0) & (o_x < width)
    return (i_row // down * height + o_y).to(tl.int64) * width + o_x, m_t


@triton.jit
def query_rows(o_t, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr):
    """A query's row less a key's is that of their bias in the table, or its place in dense ones of a head.

    For tokens beyond the last one it is a valid one.
    """
    o_t = tl.minimum(o_t, QUERIES[0] * QUERIES[1] - 1)
    return o_t * (KEYS[0] * KEYS[1]) if TABLE[0] == 0 else o_t // QUERIES[1] * TABLE[0] + o_t % QUERIES[1] + TABLE[1]


@triton.jit
def key_rows(o_t, KEYS: tl.constexpr, TABLE: tl.constexpr):
    """See `query_rows`."""
    o_t = tl.minimum(o_t, KEYS[0] * KEYS[1] - 1)
    return -o_t if TABLE[0] == 0 else o_t // KEYS[1] * TABLE[0] + o_t % KEYS[1]


@triton.jit
def biases(bias, o_rows, i_head, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr):
    """Biases of scores of a head, from a table (rows, heads) or dense, or none."""
    if bias is None:
        b_bias = 0.0
    elif TABLE[0] == 0:
        p_bias = bias + i_head * (QUERIES[0] * QUERIES[1] * KEYS[0] * KEYS[1]) + o_rows
        b_bias = tl.load(p_bias).to(tl.float32) * LOG2E
    else:
        b_bias = tl.load(bias + (o_rows * HEADS + i_head)).to(tl.float32) * LOG2E
    return b_bias


@triton.jit
def places_of_keys(k, v, o_pixel, o_c, PIXELS: tl.constexpr, FIRSTS: tl.constexpr):
    """Where the keys and the values of pixels are; ``v`` is None where both are in one map."""
    p_k = k + FIRSTS[1] + o_pixel[:, None] * PIXELS[1] + o_c[None, :]
    if v is None:
        return p_k, p_k + (FIRSTS[2] - FIRSTS[1])
    else:
        return p_k, v + FIRSTS[2] + o_pixel[:, None] * PIXELS[2] + o_c[None, :]


@triton.jit
def are_keys(o_t, m_t, KEYS: tl.constexpr, OVERLAPPING: tl.constexpr):
    """Which tokens are keys: those in the map, or all of them."""
    return o_t < KEYS[0] * KEYS[1] if OVERLAPPING else m_t


@triton.jit
def factor_of_scores(temperature, i_head, scale):
    """Of a head: the temperature of cosine attention, or ``scale`` where there is none."""
    if temperature is None:
        return scale
    else:
        return tl.load(temperature + i_head).to(tl.float32)


@triton.jit
def unit_rows(b_x):
    """Rows of unit length in fp32, and by what they were multiplied, 1e12 where they are shorter than 1e-12."""
    b_x = b_x.to(tl.float32)
    b_most = tl.max(tl.abs(b_x), axis=1)
    b_part = b_x / tl.where(b_most == 0.0, 1.0, b_most)[:, None]  # squares of these fit
    b_inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(b_part * b_part, axis=1)) * b_most, 1e-12)
    return b_x * b_inverse[:, None], b_inverse


@triton.jit
def rows_of_scores(b_x, temperature):
    """Queries or keys as scores take them: as they are, or in cosine attention of unit length."""
    return b_x if temperature is None else unit_rows(b_x)[0].to(b_x.dtype)


@triton.jit
def gradient_of_rows(b_g, b_x, temperature, factor):
    """Of queries or keys ``b_x``, from that of those of the scores but for their factor.

    And what rows have in the gradient of the factor, in cosine attention.
    """
    if temperature is None:
        b_y, b_share = b_g * factor, 0.0
    else:
        b_unit, b_inverse = unit_rows(b_x)
        b_share = tl.sum(b_g * b_unit, axis=1)
        b_along = tl.where(b_inverse < 0.999e12, b_share, 0.0)  # a shorter row was not divided by its length
        b_y = (b_g - b_unit * b_along[:, None]) * (b_inverse * factor)[:, None]
    return b_y, b_share


@triton.jit
def masked_scores(b_rows, b_columns, b_bias, m_s, factor, PRECISION: tl.constexpr):
    """Scores of queries and keys, in either order, of which ``b_bias`` is a part: -inf where not ``m_s``."""
    b_s = dot(b_rows, tl.trans(b_columns), None, PRECISION) * (factor * LOG2E) + b_bias
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
