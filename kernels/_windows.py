"""How a map is cut into windows, the windows into blocks, and blocks into tiles of tokens.

A second branch has windows shifted by p // 2 pixels, cyclically on the map padded to whole windows. Cut at the borders
of both, every block lies in one window of each branch, so that whatever is summed over blocks serves both. Padding
belongs to no block: a window at the border has smaller blocks, or fewer.

Where the shift is not cyclic, the windows over an edge do not exist, and the blocks in them, a border of half a window,
have the first branch only. Kernels cut the map all the same, and leave out what they find of those windows.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from ._launch import block_of, cdiv, power_of_2
from .depthwise import convolve_rows, stack_rows

SIZES = ["height", "width", "blocks_y", "blocks_x", "windows_y", "windows_x", "splits"]
SPLIT_TOKENS = 1024  # of a block for each program, while the programs of a block are at most
SPLITS = 128
PROGRAMS = 1024  # of a kernel, where a block has enough tiles for them


@dataclasses.dataclass(frozen=True)
class Groups:
    """How a map is cut; ``window``: rows and columns, 0 of the whole image. See `block_end` for the blocks."""

    images: int
    height: int
    width: int
    heads: int
    depth: int
    window: tuple
    branches: int
    cyclic: bool = True

    @classmethod
    def whole(cls, images, height, width, heads, depth):
        """The order of the pixels of a whole image does not matter: one row."""
        return cls(images, 1, height * width, heads, depth, (0, 0), 1)

    @property
    def pixels(self):
        return self.images * self.height * self.width

    @property
    def channels(self):
        return self.heads * self.depth

    @property
    def shift(self):
        return self.window[0] // 2 if self.branches == 2 else 0

    @property
    def label(self):
        """The windows' size in keys of configurations."""
        return self.window[0] if self.window[0] == self.window[1] else "x".join(map(str, self.window))

    def _axis(self, size, window):
        """Windows and blocks along an axis."""
        if window == 0:
            return 1, 1
        windows = cdiv(size, window)
        rest = size - (windows - 1) * window
        return windows, windows if self.shift == 0 else 2 * windows - (rest <= self.shift)

    @property
    def windows_and_blocks(self):
        """Windows down and across an image, and blocks down and across."""
        (windows_y, blocks_y), (windows_x, blocks_x) = map(self._axis, (self.height, self.width), self.window)
        return windows_y, windows_x, blocks_y, blocks_x

    @property
    def blocks(self):
        _, _, blocks_y, blocks_x = self.windows_and_blocks
        return self.images * blocks_y * blocks_x

    @property
    def matrices(self):
        windows_y, windows_x, _, _ = self.windows_and_blocks
        return self.images * windows_y * windows_x * self.heads * self.branches

    @property
    def sides(self):
        """The most rows and columns of a block in windows."""
        return [size - self.shift for size in self.window]

    @property
    def tokens(self):
        """The most tokens of a block."""
        return self.width if self.window[0] == 0 else self.sides[0] * self.sides[1]

    @property
    def splits(self):
        """Programs that share the tokens of one block."""
        return max(1, min(SPLITS, cdiv(self.tokens, SPLIT_TOKENS)))

    def splits_for(self, tiles, programs):
        """`splits` or more, that fill a GPU: of kernels with ``programs`` a split whose results do not depend on it."""
        most = cdiv(self.tokens, tiles["TILE_Y"] * tiles["TILE_X"])
        return max(1, min(most, max(self.splits, PROGRAMS // max(1, programs))))

    def tile(self, tokens, rows=None):
        """Rows and columns of a tile of at most so many tokens, at least 16."""
        if self.window[0] == 0:
            return dict(TILE_Y=1, TILE_X=tokens)
        down, across = map(power_of_2, self.sides)
        if rows is not None:
            return dict(TILE_Y=rows, TILE_X=max(16 // rows, min(tokens // rows, across)))
        columns = min(16, across)
        return dict(TILE_Y=max(16 // columns, min(tokens // columns, down)), TILE_X=columns)

    def tiles(self, tokens, warps, stages=2, rows=None):
        """A configuration; ``rows``: of its tiles, where they must be so many."""
        return dict(**self.tile(tokens, rows), BLOCK_D=block_of(self.depth), num_warps=warps, num_stages=stages)

    @property
    def constants(self):
        return dict(HEADS=self.heads, DEPTH=self.depth, P=self.window, SHIFT=self.shift, BRANCHES=self.branches)


@dataclasses.dataclass(frozen=True)
class Channels:
    """Channels of a map from ``first`` on; ``of`` is a channels-last tensor, or a view of channels of one."""

    of: torch.Tensor
    first: int = 0

    @property
    def pixel(self):
        """Values from one pixel to the next."""
        return self.of.stride(3)


def parts_of(qkv):
    """q, k and v in a map of all three."""
    channels = qkv.shape[1] // 3
    return [Channels(qkv, i * channels) for i in range(3)]


# ---- where blocks and tokens are ------------------------------------------------------------------------------------


@triton.jit
def block_begin(i_block, P: tl.constexpr, SHIFT: tl.constexpr):
    PARTS: tl.constexpr = 2 if SHIFT > 0 else 1
    return i_block // PARTS * P + i_block % PARTS * SHIFT


@triton.jit
def block_end(i_block, size, P: tl.constexpr, SHIFT: tl.constexpr):
    # Block i is part i % 2 of the window i // 2: its first SHIFT pixels, or the others. Without SHIFT it is window i.
    return size if P == 0 else tl.minimum(block_begin(i_block + 1, P, SHIFT), size)


@triton.jit
def block_window(i_block, windows, BRANCH: tl.constexpr, SHIFT: tl.constexpr):
    if SHIFT == 0:
        i_window = i_block
    elif BRANCH == 0:
        i_window = i_block // 2
    else:
        i_window = (i_block + 2 * windows - 1) // 2 % windows
    return i_window


@triton.jit
def block_position(i_block, BRANCH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr):
    # where the block begins in its window of the branch
    if SHIFT == 0:
        position = i_block * 0
    elif BRANCH == 0:
        position = i_block % 2 * SHIFT
    else:
        position = (1 - i_block % 2) * (P[0] - SHIFT)
    return position


@triton.jit
def is_inside(i_y, i_x, height, width, P: tl.constexpr):
    # whether the block lies in a shifted window that reaches over no edge of the padded map
    last_y, last_x = 2 * tl.cdiv(height, P[0]) - 1, 2 * tl.cdiv(width, P[1]) - 1
    return (i_y > 0) & (i_y < last_y) & (i_x > 0) & (i_x < last_x)


@triton.jit
def block_of_window(i_window, i_part, i_branch, windows, SHIFT: tl.constexpr):
    # it may lie outside of the map
    PARTS: tl.constexpr = 2 if SHIFT > 0 else 1
    return (i_window * PARTS + i_branch * (PARTS - 1) + i_part) % (windows * PARTS)


@triton.jit
def block_of_program(i_program, height, width, blocks_y, blocks_x, splits, HEADS: tl.constexpr, P: tl.constexpr,
                     SHIFT: tl.constexpr):  # fmt: skip
    # programs count heads first, then splits of a block, then blocks: head, split, image, the block down and across,
    # its first and last row and column
    i_block = i_program // HEADS // splits
    i_x = i_block % blocks_x
    i_y = i_block // blocks_x % blocks_y
    y0, y1 = block_begin(i_y, P[0], SHIFT), block_end(i_y, height, P[0], SHIFT)
    x0, x1 = block_begin(i_x, P[1], SHIFT), block_end(i_x, width, P[1], SHIFT)
    return i_program % HEADS, i_program // HEADS % splits, i_block // blocks_x // blocks_y, i_y, i_x, y0, y1, x0, x1


@triton.jit
def tile_of(i_tile, y0, x0, y1, x1, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    # of the block [y0, y1) x [x0, x1): the tile's first row and column, its tokens' counted from there, and their mask
    tiles_x = tl.cdiv(x1 - x0, TILE_X)
    i_y, i_x = y0 + i_tile // tiles_x * TILE_Y, x0 + i_tile % tiles_x * TILE_X
    o_t = tl.arange(0, TILE_Y * TILE_X)
    o_y, o_x = o_t // TILE_X, o_t % TILE_X
    return i_y, i_x, o_y, o_x, (o_y < y1 - i_y) & (o_x < x1 - i_x)


@triton.jit
def token_offsets(i_image, i_y, i_x, o_y, o_x, o_c, height, width, PIXEL: tl.constexpr):
    # of channels o_c of a tile's tokens: 64 bits for the tile, 32 for a token in it
    i_pixel = (i_image.to(tl.int64) * height + i_y) * width + i_x
    return i_pixel * PIXEL + (o_y * width + o_x).to(tl.int64)[:, None] * PIXEL + o_c[None, :]


@triton.jit
def tile_range(i_split, splits, y0, x0, y1, x1, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    tiles = tl.cdiv(y1 - y0, TILE_Y) * tl.cdiv(x1 - x0, TILE_X)
    each = tl.cdiv(tiles, splits)
    return i_split * each, tl.minimum((i_split + 1) * each, tiles)


@triton.jit
def load_tokens(
    x, taps, i_image, i_y, i_x, o_y, o_x, m_t, o_c, m_c, height, width, PIXEL: tl.constexpr, DEPTHWISE: tl.constexpr
):
    # channels o_c of a tile's tokens, (tokens, channels); after a depthwise 3 x 3 convolution by taps (9 or 10, PIXEL),
    # of which DEPTHWISE is the number, then a tile has four rows
    m_x = m_t[:, None] & m_c[None, :]
    if DEPTHWISE:
        TILE_X: tl.constexpr = o_y.shape[0] // 4
        BLOCK_C: tl.constexpr = o_c.shape[0]
        o_column = i_x + tl.arange(0, TILE_X)
        b_rows = convolve_rows(
            x, taps, i_image, i_y, o_column, o_c, height, width, PIXEL, 3, DEPTHWISE == 10, False, TILE_X, BLOCK_C
        )  # fmt: skip
        b_x = stack_rows(b_rows[0], b_rows[1], b_rows[2], b_rows[3], TILE_X, BLOCK_C)
        b_out = tl.where(m_x, b_x, 0.0).to(x.dtype.element_ty)
    else:
        p_x = x + token_offsets(i_image, i_y, i_x, o_y, o_x, o_c, height, width, PIXEL)
        b_out = tl.load(p_x, mask=m_x, other=0.0)
    return b_out


@triton.jit
def load_weights(weight, i_head, o_y, o_x, m_t, P: tl.constexpr):
    # of tokens at positions in the window; zeros outside of the map
    return tl.load(weight + (i_head * P[0] + o_y) * P[1] + o_x, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def piece_of_window(i_piece, i_matrix, windows_y, windows_x, blocks_y, blocks_x, BRANCHES: tl.constexpr,
                    HEADS: tl.constexpr, DEPTH: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    # of matrix (image, window, head, branch): the block down and across, its slot, and how many channels count: none
    # where the block lies outside of the map
    PARTS: tl.constexpr = 2 if SHIFT > 0 else 1
    i_branch = i_matrix % BRANCHES
    i_head = i_matrix // BRANCHES % HEADS
    i_window = i_matrix // (BRANCHES * HEADS)
    i_y = block_of_window(i_window // windows_x % windows_y, i_piece // PARTS, i_branch, windows_y, SHIFT)
    i_x = block_of_window(i_window % windows_x, i_piece % PARTS, i_branch, windows_x, SHIFT)
    i_block = (i_window // windows_x // windows_y * blocks_y + i_y) * blocks_x + i_x
    rows = tl.where((i_y < blocks_y) & (i_x < blocks_x), DEPTH, 0)
    return i_y, i_x, i_block * HEADS + i_head, rows


@triton.jit
def matrix_of(i_image, i_y, i_x, i_head, windows_y, windows_x, BRANCH: tl.constexpr, BRANCHES: tl.constexpr,
              HEADS: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    # the index of the matrix of the block (i_y, i_x) of an image
    i_wy, i_wx = block_window(i_y, windows_y, BRANCH, SHIFT), block_window(i_x, windows_x, BRANCH, SHIFT)
    return (((i_image.to(tl.int64) * windows_y + i_wy) * windows_x + i_wx) * HEADS + i_head) * BRANCHES + BRANCH
