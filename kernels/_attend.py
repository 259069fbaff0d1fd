"""The forward of channel attention, second part: attention matrices of windows, and their product with v."""

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._gram import MOST
from ._launch import Work, block_of, cdiv, config, key_of, launch, precision
from ._windows import (
    SIZES,
    block_of_program,
    block_position,
    is_inside,
    load_tokens,
    load_weights,
    matrix_of,
    piece_of_window,
    tile_of,
    tile_range,
    token_offsets,
)
from .depthwise import rows_of


@triton.jit
def piece_factors(p_n, p_f, o_c, m_c):
    # of channels of a slot, MOST where they are zero
    b_n = tl.load(p_n + o_c, mask=m_c, other=0.0)
    return tl.where(b_n == 0.0, MOST, tl.load(p_f + o_c, mask=m_c, other=1.0))


@triton.jit(do_not_specialize=SIZES)
def attend_fwd_kernel(
    slots, temperature, attention, windows_y, windows_x, blocks_y, blocks_x,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    DIVIDES: tl.constexpr, SCALES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_s: (BLOCK_R of q, BLOCK_D of k); temperature: (SCALES, HEADS), of both branches or of each; attention: (images,
    # windows, HEADS, BRANCHES, DEPTH, DEPTH)
    PARTS: tl.constexpr = 2 if SHIFT > 0 else 1
    SLOT: tl.constexpr = DEPTH * (BRANCHES * (DEPTH + 2) + 2)
    i_matrix = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    i_branch = i_matrix % BRANCHES
    p_s = o_r[:, None] * DEPTH + o_d[None, :]
    b_s = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    b_q = tl.zeros((BLOCK_R,), dtype=tl.float32)
    b_k = tl.zeros((BLOCK_D,), dtype=tl.float32)
    b_fq = tl.full((BLOCK_R,), MOST, dtype=tl.float32)  # of the sums
    b_fk = tl.full((BLOCK_D,), MOST, dtype=tl.float32)
    for i_piece in tl.static_range(PARTS * PARTS):
        _, _, i_slot, rows = piece_of_window(
            i_piece, i_matrix, windows_y, windows_x, blocks_y, blocks_x, BRANCHES, HEADS, DEPTH, SHIFT
        )
        p_n = slots + i_slot * SLOT + DEPTH * (BRANCHES * DEPTH + 2 * i_branch)
        p_f = slots + i_slot * SLOT + DEPTH * BRANCHES * (DEPTH + 2)
        b_fq = tl.minimum(b_fq, piece_factors(p_n, p_f, o_r, o_r < rows))
        b_fk = tl.minimum(b_fk, piece_factors(p_n + DEPTH, p_f + DEPTH, o_d, o_d < rows))
    for i_piece in tl.static_range(PARTS * PARTS):
        _, _, i_slot, rows = piece_of_window(
            i_piece, i_matrix, windows_y, windows_x, blocks_y, blocks_x, BRANCHES, HEADS, DEPTH, SHIFT
        )
        m_r, m_d = o_r < rows, o_d < rows
        p_slot = slots + i_slot * SLOT
        p_n = p_slot + DEPTH * (BRANCHES * DEPTH + 2 * i_branch)
        p_f = p_slot + DEPTH * BRANCHES * (DEPTH + 2)
        b_tq = b_fq / piece_factors(p_n, p_f, o_r, m_r)
        b_tk = b_fk / piece_factors(p_n + DEPTH, p_f + DEPTH, o_d, m_d)
        b_g = tl.load(p_slot + i_branch * DEPTH * DEPTH + p_s, mask=m_r[:, None] & m_d[None, :], other=0.0)
        b_s += b_g * b_tq[:, None] * b_tk[None, :]
        b_q += tl.load(p_n + o_r, mask=m_r, other=0.0) * b_tq * b_tq
        b_k += tl.load(p_n + DEPTH + o_d, mask=m_d, other=0.0) * b_tk * b_tk
    i_head = i_matrix // BRANCHES % HEADS
    scale = tl.load(temperature + i_branch % SCALES * HEADS + i_head).to(tl.float32)
    if DIVIDES:
        scale = 1.0 / scale
    b_q = 1.0 / tl.maximum(tl.sqrt_rn(b_q), 1e-12 * b_fq)
    b_k = 1.0 / tl.maximum(tl.sqrt_rn(b_k), 1e-12 * b_fk)
    b_s = b_s * b_q[:, None] * b_k[None, :] * scale
    m_r, m_d = o_r < DEPTH, o_d < DEPTH
    b_s = tl.where(m_d[None, :], b_s, float("-inf"))
    b_s = tl.exp(b_s - tl.max(b_s, axis=1)[:, None])
    b_s = b_s / tl.sum(b_s, axis=1)[:, None]
    p_a = attention + i_matrix * DEPTH * DEPTH + p_s
    tl.store(p_a, b_s.to(attention.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])


def scales_of(temperature):
    """1 of a temperature (heads,), 2 of one for each branch, (2, heads)."""
    return temperature.dim()


def attend(groups, slots, temperature, divides, dtype):
    """The attention matrices (matrices, depth, depth) of all windows, heads and branches."""
    depth = groups.depth
    attention = slots.new_empty(groups.matrices, depth, depth, dtype=dtype)
    block_d = block_of(depth)
    candidates = [dict(BLOCK_R=rows, BLOCK_D=block_d, num_warps=warps) for rows, warps in ((16, 4), (32, 4), (16, 2))]
    tiles = config("attend_fwd", key_of(slots, depth, groups.branches), candidates, slots.device)
    launch(
        attend_fwd_kernel, (groups.matrices, cdiv(depth, tiles["BLOCK_R"])), slots, temperature, attention,
        *groups.windows_and_blocks, **groups.constants, DIVIDES=divides, SCALES=scales_of(temperature), **tiles,
        work=Work(slots.numel() * 4 + attention.numel() * attention.element_size(), vector=12 * attention.numel()),
    )  # fmt: skip
    return attention


# ---- the product with v ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    v, attention, weight_0, weight_1, depthwise, out, height, width, windows_y, windows_x, blocks_y, blocks_x, splits,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    CYCLIC: tl.constexpr, V_PIXEL: tl.constexpr, V_FIRST: tl.constexpr, DEPTHWISE: tl.constexpr,
    PRECISION: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_v, b_o: (tile, BLOCK_D); b_a: (BLOCK_D of out, BLOCK_D of v)
    tl.static_assert(TILE_Y == 4 or not DEPTHWISE, "rows are convolved by fours")
    i_program = tl.program_id(0)
    i_head, i_split, i_image, i_y, i_x, y0, y1, x0, x1 = block_of_program(
        i_program, height, width, blocks_y, blocks_x, splits, HEADS, P, SHIFT
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DEPTH
    o_c = i_head * DEPTH + o_d
    p_a = attention + o_d[:, None] * DEPTH + o_d[None, :]
    m_a = m_d[:, None] & m_d[None, :]
    i_matrix = matrix_of(i_image, i_y, i_x, i_head, windows_y, windows_x, 0, BRANCHES, HEADS, SHIFT)
    b_a0 = tl.trans(tl.load(p_a + i_matrix * DEPTH * DEPTH, mask=m_a, other=0.0))
    if BRANCHES == 2:
        i_matrix = matrix_of(i_image, i_y, i_x, i_head, windows_y, windows_x, 1, BRANCHES, HEADS, SHIFT)
        b_a1 = tl.trans(tl.load(p_a + i_matrix * DEPTH * DEPTH, mask=m_a, other=0.0))
    first, last = tile_range(i_split, splits, y0, x0, y1, x1, TILE_Y, TILE_X)
    for i_tile in range(first, last):
        i_ty, i_tx, o_y, o_x, m_t = tile_of(i_tile, y0, x0, y1, x1, TILE_Y, TILE_X)
        b_v = load_tokens(
            v, depthwise, i_image, i_ty, i_tx, o_y, o_x, m_t, V_FIRST + o_c, m_d, height, width, V_PIXEL, DEPTHWISE
        )
        b_o = dot(b_v, b_a0, None, PRECISION)
        if BRANCHES == 2:
            o_wy = block_position(i_y, 0, P, SHIFT) + i_ty - y0 + o_y
            o_wx = block_position(i_x, 0, P, SHIFT) + i_tx - x0 + o_x
            b_w0 = load_weights(weight_0, i_head, o_wy, o_wx, m_t, P)
            b_w1 = load_weights(weight_1, i_head, o_wy, o_wx, m_t, P)
            b_merged = b_o * b_w0[:, None] + dot(b_v, b_a1, None, PRECISION) * b_w1[:, None]
            b_o = b_merged if CYCLIC else tl.where(is_inside(i_y, i_x, height, width, P), b_merged, b_o)
        p_o = out + token_offsets(i_image, i_ty, i_tx, o_y, o_x, o_c, height, width, HEADS * DEPTH)
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


def apply(groups, v, attention, weights, out, depthwise=None):
    """Writes the attention's product with `Channels` ``v``, merged by the weights of the branches.

    ``depthwise``: taps of a convolution of ``v`` before it, of `taps_of`.
    """
    if depthwise is not None:
        shapes = [(16, 8), (32, 8), (16, 4)] if v.of.dtype == torch.float32 else [(64, 4), (64, 8), (32, 4), (32, 8)]
        candidates = [groups.tiles(*shape, 1, rows=4) for shape in shapes]
    elif v.of.dtype == torch.float32:
        candidates = [groups.tiles(32, 8, 2 if groups.depth <= 32 else 1), groups.tiles(16, 8, 1)]
    elif groups.depth > 64:
        candidates = [groups.tiles(32, 8), groups.tiles(32, 4, 1)]
    else:
        shapes = [(64, 4), (64, 8), (128, 8), (32, 4), (128, 4), (64, 4, 1)]
        candidates = [groups.tiles(*shape) for shape in shapes]
    key = key_of(v.of, groups.depth, groups.label, groups.branches, *(["depthwise"] if depthwise is not None else []))
    tiles = config("apply", key, candidates, v.of.device)
    windows_y, windows_x, blocks_y, blocks_x = groups.windows_and_blocks
    splits = groups.splits_for(tiles, groups.blocks * groups.heads)
    launch(
        apply_kernel, (groups.blocks * splits * groups.heads,), v.of, attention, *weights, depthwise, out,
        groups.height, groups.width, windows_y, windows_x, blocks_y, blocks_x, splits, **groups.constants,
        CYCLIC=groups.cyclic, V_PIXEL=v.pixel, V_FIRST=v.first, DEPTHWISE=rows_of(depthwise), PRECISION=precision(v.of),
        **tiles,
        work=Work(
            (2 * out.numel() + attention.numel()) * out.element_size(),
            matrix=2 * groups.branches * out.numel() * groups.depth,
            vector=0 if depthwise is None else 18 * out.numel(),
        ),
    )  # fmt: skip
