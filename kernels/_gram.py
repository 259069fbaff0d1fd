"""The forward of channel attention, first part: Gram matrices of blocks. The rest is in _attend.py.

softmax(scale * q^ k^T) with q^, k^ normalised over a window's tokens needs q and k only through their products and
norms, which are summed over the blocks of the window. Token weights w multiply q and k, so w^2 k serves instead.
Where the shift is not cyclic, what the second branch has of blocks in the border serves nothing.

Bytes a pixel of C channels of T bytes: gram reads q and k, 2 C T, for all branches at once, and writes a slot of
d (d + 2) fp32 values for each block, head and branch; attend reads the slots and writes d x d matrices of T; apply
reads v and writes the result, 2 C T.

Values whose squares fp32 cannot hold are multiplied by a power of two for each channel of q and k of a slot, its
factors: a program that finds its norms out of range reads its tokens twice more.
"""

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._launch import Work, block_of, cdiv, config, key_of, launch, precision
from ._windows import (
    SIZES,
    block_of_program,
    block_position,
    is_inside,
    load_tokens,
    load_weights,
    tile_of,
    tile_range,
)
from .depthwise import rows_of

MOST = tl.constexpr(2.0**127)  # the largest factor


@triton.jit
def weighted_product(b_q, b_k, b_w, PRECISION: tl.constexpr):
    # sum over tokens of w q k^T; fp16 could overflow where w > 1
    if b_k.dtype == tl.float16:
        most = tl.max(tl.abs(b_w))
        most = tl.where(most > 0, most, 1.0)
        b_k = (b_k.to(tl.float32) * (b_w / most)[:, None]).to(b_k.dtype)
        b_g = dot(tl.trans(b_q), b_k, None, PRECISION) * most
    else:
        b_k = (b_k.to(tl.float32) * b_w[:, None]).to(b_k.dtype)
        b_g = dot(tl.trans(b_q), b_k, None, PRECISION)
    return b_g


@triton.jit
def partial_sums(b_x, ROWS: tl.constexpr):
    # (tile, channels) summed to (ROWS, channels): over tokens of one thread, so that no thread waits for another
    return tl.sum(tl.reshape(b_x, (b_x.shape[0] // ROWS, ROWS, b_x.shape[1])), axis=0)


@triton.jit
def sum_tokens(
    q, k, weight_0, weight_1, depthwise, b_fq, b_fk, i_image, i_head, i_y, i_x, y0, x0, y1, x1, first, last,
    height, width, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    CYCLIC: tl.constexpr, Q_PIXEL: tl.constexpr, Q_FIRST: tl.constexpr, K_PIXEL: tl.constexpr, K_FIRST: tl.constexpr,
    NORMS: tl.constexpr, DEPTHWISE: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # products of q and k, and for both branches their squared norms; b_fq, b_fk: factors of q and k, if SCALED
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DEPTH
    o_q = Q_FIRST + i_head * DEPTH + o_d
    o_k = K_FIRST + i_head * DEPTH + o_d
    b_g0 = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    b_g1 = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    b_q0 = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_k0 = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_q1 = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_k1 = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for i_tile in range(first, last):
        i_ty, i_tx, o_y, o_x, m_t = tile_of(i_tile, y0, x0, y1, x1, TILE_Y, TILE_X)
        b_q = load_tokens(q, depthwise, i_image, i_ty, i_tx, o_y, o_x, m_t, o_q, m_d, height, width, Q_PIXEL, DEPTHWISE)
        b_k = load_tokens(k, depthwise, i_image, i_ty, i_tx, o_y, o_x, m_t, o_k, m_d, height, width, K_PIXEL, DEPTHWISE)
        if SCALED:
            b_q = (b_q.to(tl.float32) * b_fq[None, :]).to(b_q.dtype)
            b_k = (b_k.to(tl.float32) * b_fk[None, :]).to(b_k.dtype)
        b_qq = b_q.to(tl.float32) * b_q.to(tl.float32)
        b_kk = b_k.to(tl.float32) * b_k.to(tl.float32)
        if BRANCHES == 1:
            b_g0 += dot(tl.trans(b_q), b_k, None, PRECISION)
            b_q0 += partial_sums(b_qq, ROWS)
            b_k0 += partial_sums(b_kk, ROWS)
        else:
            i_ty, i_tx = i_ty - y0, i_tx - x0
            o_wy, o_wx = block_position(i_y, 0, P, SHIFT) + i_ty + o_y, block_position(i_x, 0, P, SHIFT) + i_tx + o_x
            b_w0 = load_weights(weight_0, i_head, o_wy, o_wx, m_t, P)
            if NORMS:
                o_wy = block_position(i_y, 1, P, SHIFT) + i_ty + o_y
                o_wx = block_position(i_x, 1, P, SHIFT) + i_tx + o_x
                b_w1 = load_weights(weight_0 if weight_1 is None else weight_1, i_head, o_wy, o_wx, m_t, P)
                b_w0 *= b_w0
                b_w1 *= b_w1
                b_q0 += partial_sums(b_qq * b_w0[:, None], ROWS)
                b_k0 += partial_sums(b_kk * b_w0[:, None], ROWS)
                b_q1 += partial_sums(b_qq * b_w1[:, None], ROWS)
                b_k1 += partial_sums(b_kk * b_w1[:, None], ROWS)
            else:
                b_w1 = load_weights(weight_1, i_head, o_wy, o_wx, m_t, P)
                if not CYCLIC:
                    b_w0 = tl.where(is_inside(i_y, i_x, height, width, P), b_w0, 1.0)
            b_g0 += weighted_product(b_q, b_k, b_w0, PRECISION)
            b_g1 += weighted_product(b_q, b_k, b_w1, PRECISION)
    return b_g0, b_g1, tl.sum(b_q0, axis=0), tl.sum(b_k0, axis=0), tl.sum(b_q1, axis=0), tl.sum(b_k1, axis=0)


@triton.jit
def largest_of_tokens(
    x, depthwise, i_image, y0, x0, y1, x1, first, last, o_c, m_c, height, width,
    PIXEL: tl.constexpr, DEPTHWISE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    b_most = tl.zeros((o_c.shape[0],), dtype=tl.float32)
    for i_tile in range(first, last):
        i_y, i_x, o_y, o_x, m_t = tile_of(i_tile, y0, x0, y1, x1, TILE_Y, TILE_X)
        b_x = load_tokens(x, depthwise, i_image, i_y, i_x, o_y, o_x, m_t, o_c, m_c, height, width, PIXEL, DEPTHWISE)
        b_most = tl.maximum(b_most, tl.max(tl.abs(b_x.to(tl.float32)), axis=0))
    return b_most


@triton.jit
def in_range(b_square0, b_square1):
    # sums of these, and products of two such channels, are far from fp32's limits
    b_square = tl.maximum(b_square0, b_square1)
    return (b_square >= 8.3e-25) & (b_square <= 1.2e30)


@triton.jit
def factor_of(b_most, b_fits):
    # the power of two that brings the largest value to about 1
    exponent = tl.minimum(b_most.to(tl.int32, bitcast=True) & 0x7F800000, 253 << 23)
    b_f = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return tl.where(b_fits | (b_most == 0.0), 1.0, b_f)


@triton.jit
def store_slot(p_slot, b_g0, b_g1, b_q0, b_k0, b_q1, b_k1, o_d, DEPTH: tl.constexpr, BRANCHES: tl.constexpr,
               NORMS: tl.constexpr):  # fmt: skip
    m_d = o_d < DEPTH
    p_g = p_slot + o_d[:, None] * DEPTH + o_d[None, :]
    m_g = m_d[:, None] & m_d[None, :]
    p_n = p_slot + BRANCHES * DEPTH * DEPTH + o_d
    tl.store(p_g, b_g0, mask=m_g)
    if BRANCHES == 2:
        tl.store(p_g + DEPTH * DEPTH, b_g1, mask=m_g)
    if NORMS:
        tl.store(p_n, b_q0, mask=m_d)
        tl.store(p_n + DEPTH, b_k0, mask=m_d)
        if BRANCHES == 2:
            tl.store(p_n + 2 * DEPTH, b_q1, mask=m_d)
            tl.store(p_n + 3 * DEPTH, b_k1, mask=m_d)


@triton.jit(do_not_specialize=SIZES)
def gram_kernel(
    q, k, weight_0, weight_1, depthwise, slots, height, width, blocks_y, blocks_x, splits,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    CYCLIC: tl.constexpr, Q_PIXEL: tl.constexpr, Q_FIRST: tl.constexpr, K_PIXEL: tl.constexpr, K_FIRST: tl.constexpr,
    NORMS: tl.constexpr, DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_k: (tile, BLOCK_D); b_g: (BLOCK_D of q, BLOCK_D of k); slots: (blocks, splits, HEADS, SLOT)
    # NORMS: weight_0, weight_1 (None: the same) are w of the branches, by the position in the branch's window, and
    # multiply q and k, of which the slot gets the squared norms and the factors, too. Else they are merge weights, by
    # the unshifted windows.
    SLOT: tl.constexpr = DEPTH * (BRANCHES * (DEPTH + 2) + 2) if NORMS else BRANCHES * DEPTH * DEPTH
    tl.static_assert(TILE_Y == 4 or not DEPTHWISE, "rows are convolved by fours")
    i_program = tl.program_id(0)
    i_head, i_split, i_image, i_y, i_x, y0, y1, x0, x1 = block_of_program(
        i_program, height, width, blocks_y, blocks_x, splits, HEADS, P, SHIFT
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DEPTH
    first, last = tile_range(i_split, splits, y0, x0, y1, x1, TILE_Y, TILE_X)
    p_slot = slots + i_program.to(tl.int64) * SLOT
    b_g0, b_g1, b_q0, b_k0, b_q1, b_k1 = sum_tokens(
        q, k, weight_0, weight_1, depthwise, None, None, i_image, i_head, i_y, i_x, y0, x0, y1, x1, first, last,
        height, width, DEPTH, P, SHIFT, BRANCHES, CYCLIC, Q_PIXEL, Q_FIRST, K_PIXEL, K_FIRST,
        NORMS, DEPTHWISE, False, PRECISION, TILE_Y, TILE_X, ROWS, BLOCK_D,
    )  # fmt: skip
    store_slot(p_slot, b_g0, b_g1, b_q0, b_k0, b_q1, b_k1, o_d, DEPTH, BRANCHES, NORMS)
    if NORMS:
        b_fq = tl.full((BLOCK_D,), 1.0, dtype=tl.float32)
        b_fk = tl.full((BLOCK_D,), 1.0, dtype=tl.float32)
        if q.dtype.element_ty != tl.float16:  # its squares always fit
            m_q, m_k = in_range(b_q0, b_q1), in_range(b_k0, b_k1)
            if tl.sum(tl.where(m_d & ~(m_q & m_k), 1, 0), axis=0) > 0:
                b_fq = factor_of(
                    largest_of_tokens(
                        q, depthwise, i_image, y0, x0, y1, x1, first, last, Q_FIRST + i_head * DEPTH + o_d, m_d,
                        height, width, Q_PIXEL, DEPTHWISE, TILE_Y, TILE_X,
                    ), m_q,
                )  # fmt: skip
                b_fk = factor_of(
                    largest_of_tokens(
                        k, depthwise, i_image, y0, x0, y1, x1, first, last, K_FIRST + i_head * DEPTH + o_d, m_d,
                        height, width, K_PIXEL, DEPTHWISE, TILE_Y, TILE_X,
                    ), m_k,
                )  # fmt: skip
                b_g0, b_g1, b_q0, b_k0, b_q1, b_k1 = sum_tokens(
                    q, k, weight_0, weight_1, depthwise, b_fq, b_fk,
                    i_image, i_head, i_y, i_x, y0, x0, y1, x1, first, last,
                    height, width, DEPTH, P, SHIFT, BRANCHES, CYCLIC, Q_PIXEL, Q_FIRST, K_PIXEL, K_FIRST,
                    NORMS, DEPTHWISE, True, PRECISION, TILE_Y, TILE_X, ROWS, BLOCK_D,
                )  # fmt: skip
                store_slot(p_slot, b_g0, b_g1, b_q0, b_k0, b_q1, b_k1, o_d, DEPTH, BRANCHES, NORMS)
        p_f = p_slot + BRANCHES * DEPTH * (DEPTH + 2) + o_d
        tl.store(p_f, b_fq, mask=m_d)
        tl.store(p_f + DEPTH, b_fk, mask=m_d)


@triton.jit
def common_factors(p_slot, o_c, m_v, DEPTH: tl.constexpr, BRANCHES: tl.constexpr):
    # of channels o_c (k's after q's) the least of the splits' factors, but for splits where they are zero, and what
    # this takes from each split: (BLOCK_V,) and (BLOCK_S, BLOCK_V)
    p_n = p_slot + BRANCHES * DEPTH * DEPTH + o_c[None, :]
    b_n = tl.load(p_n, mask=m_v, other=0.0)
    if BRANCHES == 2:
        b_n += tl.load(p_n + 2 * DEPTH, mask=m_v, other=0.0)
    b_f = tl.load(p_n + 2 * BRANCHES * DEPTH, mask=m_v, other=1.0)
    b_f = tl.where(b_n == 0.0, MOST, b_f)
    b_least = tl.min(b_f, axis=0)
    return b_least, b_least[None, :] / b_f


@triton.jit(do_not_specialize=["splits"])
def join_kernel(
    slots, joined, splits,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, BRANCHES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # slots (blocks, splits, HEADS, SLOT) become their sums over splits, (blocks, HEADS, SLOT)
    MATRICES: tl.constexpr = BRANCHES * DEPTH * DEPTH
    SLOT: tl.constexpr = MATRICES + 2 * DEPTH * (BRANCHES + 1)
    i_slot = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_s = tl.arange(0, BLOCK_S)
    m_v = (o_s < splits)[:, None] & (o_v < SLOT)[None, :]
    p_slot = slots + ((i_slot // HEADS * splits + o_s) * HEADS + i_slot % HEADS)[:, None] * SLOT
    o_n = tl.maximum(o_v - MATRICES, 0) % (2 * DEPTH)  # the channel of a norm or factor
    b_least, b_q = common_factors(p_slot, tl.where(o_v < MATRICES, o_v // DEPTH % DEPTH, o_n), m_v, DEPTH, BRANCHES)
    _, b_k = common_factors(p_slot, tl.where(o_v < MATRICES, DEPTH + o_v % DEPTH, o_n), m_v, DEPTH, BRANCHES)
    b_v = tl.sum(tl.load(p_slot + o_v[None, :], mask=m_v, other=0.0) * b_q * b_k, axis=0)
    b_v = tl.where(o_v < SLOT - 2 * DEPTH, b_v, b_least)
    tl.store(joined + i_slot * SLOT + o_v, b_v, mask=o_v < SLOT)


def join(groups, slots):
    """The sums of slots (blocks, splits, heads, values) over splits."""
    blocks, splits, heads, values = slots.shape
    joined = slots.new_empty(blocks, heads, values)
    tiles = dict(BLOCK_S=block_of(splits, 2), BLOCK_V=32, num_warps=8)
    launch(
        join_kernel, (blocks * heads, cdiv(values, tiles["BLOCK_V"])), slots, joined, splits,
        HEADS=heads, DEPTH=groups.depth, BRANCHES=groups.branches, **tiles,
        work=Work((slots.numel() + joined.numel()) * 4, vector=4 * slots.numel()),
    )  # fmt: skip
    return joined


def sums_of(tiles, x):
    """Tokens of a tile that are in different threads where each reads 16 bytes at once."""
    rows = 32 * tiles["num_warps"] * (16 // x.element_size()) // tiles["BLOCK_D"]
    return min(rows, tiles["TILE_Y"] * tiles["TILE_X"])


def of_branches(token_weight):
    """Token weights (heads, p, p), or (2, heads, p, p) of each branch, as `gram` takes them."""
    return (token_weight, None) if token_weight is None or token_weight.dim() == 3 else tuple(token_weight)


def gram(groups, q, k, weights=(None, None), norms=True, depthwise=None):
    """Slots (blocks, heads, values) of the products of `Channels` ``q`` and ``k``, and of their norms.

    ``weights``: see `gram_kernel`. ``depthwise``: taps of a convolution of both, of `taps_of`.
    """
    values = groups.depth * (groups.branches * (groups.depth + 2) + 2 if norms else groups.branches * groups.depth)
    splits = groups.splits
    slots = q.of.new_empty(groups.blocks, splits, groups.heads, values, dtype=torch.float32)
    _, _, blocks_y, blocks_x = groups.windows_and_blocks
    if depthwise is not None:  # nine neighbours of every token, of q and of k
        if q.of.dtype == torch.float32:
            shapes = [(32, 8), (16, 4), (16, 8)] if groups.depth <= 32 else [(16, 8)]
        else:
            shapes = [(64, 4), (64, 8), (32, 4), (32, 8)] if groups.depth <= 32 else [(64, 8), (32, 8), (16, 4)]
        candidates = [groups.tiles(*shape, 1, rows=4) for shape in shapes]
    elif q.of.dtype == torch.float32:
        candidates = [groups.tiles(32 if groups.depth <= 32 else 16, 8, 1), groups.tiles(16, 4)]
    elif groups.depth > 64:
        candidates = [groups.tiles(32, 8), groups.tiles(32, 4)]
    else:
        first = groups.tiles(64, 8 if q.of.dtype == torch.float16 and groups.depth > 32 else 4)
        shapes = [(64, 8), (32, 4, 1), (128, 8, 1), (32, 4), (16, 4)]
        candidates = [first, *(groups.tiles(*shape) for shape in shapes)]
    key = key_of(q.of, groups.depth, groups.label, groups.branches, *(["depthwise"] if depthwise is not None else []))
    tiles = config("gram", key, candidates, q.of.device)
    map_values = groups.pixels * groups.channels
    launch(
        gram_kernel, (groups.blocks * splits * groups.heads,), q.of, k.of, *weights, depthwise, slots,
        groups.height, groups.width, blocks_y, blocks_x, splits, **groups.constants,
        CYCLIC=groups.cyclic, Q_PIXEL=q.pixel, Q_FIRST=q.first, K_PIXEL=k.pixel, K_FIRST=k.first,
        NORMS=norms, DEPTHWISE=rows_of(depthwise), PRECISION=precision(q.of), **tiles, ROWS=sums_of(tiles, q.of),
        work=Work(
            2 * map_values * q.of.element_size() + slots.numel() * 4,
            matrix=2 * groups.branches * map_values * groups.depth,
            vector=map_values * (8 * groups.branches + (36 if depthwise is not None else 0)),
        ),
    )  # fmt: skip
    if splits == 1:
        return slots[:, 0]
    return join(groups, slots) if norms else slots.sum(dim=1)
