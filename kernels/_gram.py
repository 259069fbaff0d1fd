"""The forward of channel attention: Gram matrices of blocks, attention matrices of windows, their product with v.

softmax(scale * q^ k^T) with q^, k^ normalised over a window's tokens needs q and k only through their products and
norms, which are summed over the blocks of the window. Token weights w multiply q and k, so w^2 k serves instead.

Bytes a pixel of C channels of T bytes: gram reads q and k, 2 C T, for all branches at once, and writes a slot of
d (d + 2) fp32 values for each block, head and branch; attend reads the slots and writes d x d matrices of T; apply
reads v and writes the result, 2 C T.
"""

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._launch import Work, block_of, config, key_of, launch, precision
from ._windows import (
    SIZES,
    block_of_program,
    block_position,
    load_tokens,
    load_weights,
    matrix_of,
    piece_of_window,
    tile_range,
    tile_tokens,
)

# ---- Gram matrices --------------------------------------------------------------------------------------------------


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


@triton.jit(do_not_specialize=SIZES)
def gram_kernel(
    q, k, weight_0, weight_1, depthwise, slots, height, width, blocks_y, blocks_x, splits,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    Q_PIXEL: tl.constexpr, Q_FIRST: tl.constexpr, K_PIXEL: tl.constexpr, K_FIRST: tl.constexpr,
    NORMS: tl.constexpr, DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_k: (tile, BLOCK_D); b_g: (BLOCK_D of q, BLOCK_D of k); slots: (blocks, splits, HEADS, SLOT)
    # NORMS: weight_0 is w of both branches, by the position in the branch's window, and multiplies q and k, of which
    # the slot gets the squared norms, too. Else weight_0, weight_1 belong to the branches, by the unshifted windows.
    SLOT: tl.constexpr = BRANCHES * DEPTH * (DEPTH + 2 * NORMS)
    i_program = tl.program_id(0).to(tl.int64)
    i_head, i_split, i_image, i_y, i_x, y0, y1, x0, x1 = block_of_program(
        i_program, height, width, blocks_y, blocks_x, splits, HEADS, P, SHIFT
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DEPTH
    o_q = Q_FIRST + i_head * DEPTH + o_d
    o_k = K_FIRST + i_head * DEPTH + o_d
    b_g0 = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    b_g1 = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    b_q0 = tl.zeros((BLOCK_D,), dtype=tl.float32)
    b_k0 = tl.zeros((BLOCK_D,), dtype=tl.float32)
    b_q1 = tl.zeros((BLOCK_D,), dtype=tl.float32)
    b_k1 = tl.zeros((BLOCK_D,), dtype=tl.float32)
    first, last = tile_range(i_split, splits, y0, x0, y1, x1, TILE_Y, TILE_X)
    for i_tile in range(first, last):
        o_y, o_x, m_t = tile_tokens(i_tile, y0, x0, y1, x1, TILE_Y, TILE_X)
        b_q = load_tokens(q, depthwise, i_image, o_y, o_x, m_t, o_q, m_d, height, width, Q_PIXEL, DEPTHWISE)
        b_k = load_tokens(k, depthwise, i_image, o_y, o_x, m_t, o_k, m_d, height, width, K_PIXEL, DEPTHWISE)
        b_qq = b_q.to(tl.float32) * b_q.to(tl.float32)
        b_kk = b_k.to(tl.float32) * b_k.to(tl.float32)
        if BRANCHES == 1:
            b_g0 += dot(tl.trans(b_q), b_k, None, PRECISION)
            b_q0 += tl.sum(b_qq, axis=0)
            b_k0 += tl.sum(b_kk, axis=0)
        else:
            o_wy, o_wx = block_position(i_y, 0, P, SHIFT) + o_y - y0, block_position(i_x, 0, P, SHIFT) + o_x - x0
            b_w0 = load_weights(weight_0, i_head, o_wy, o_wx, m_t, P)
            if NORMS:
                o_wy, o_wx = block_position(i_y, 1, P, SHIFT) + o_y - y0, block_position(i_x, 1, P, SHIFT) + o_x - x0
                b_w1 = load_weights(weight_0, i_head, o_wy, o_wx, m_t, P)
                b_w0 *= b_w0
                b_w1 *= b_w1
                b_q0 += tl.sum(b_qq * b_w0[:, None], axis=0)
                b_k0 += tl.sum(b_kk * b_w0[:, None], axis=0)
                b_q1 += tl.sum(b_qq * b_w1[:, None], axis=0)
                b_k1 += tl.sum(b_kk * b_w1[:, None], axis=0)
            else:
                b_w1 = load_weights(weight_1, i_head, o_wy, o_wx, m_t, P)
            b_g0 += weighted_product(b_q, b_k, b_w0, PRECISION)
            b_g1 += weighted_product(b_q, b_k, b_w1, PRECISION)
    p_slot = slots + i_program * SLOT
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


def gram(groups, q, k, weights=(None, None), norms=True, depthwise=None):
    """Slots (blocks, heads, values) of the products of `Channels` ``q`` and ``k``, and of their norms.

    ``weights``: see `gram_kernel`. ``depthwise``: taps (9, channels of the map) of a convolution of both, in fp32.
    """
    values = groups.branches * groups.depth * (groups.depth + 2 * norms)
    splits = groups.splits
    slots = q.of.new_empty(groups.blocks, splits, groups.heads, values, dtype=torch.float32)
    _, _, blocks_y, blocks_x = groups.windows_and_blocks
    if depthwise is not None:  # nine neighbours of every token, of q and of k
        candidates = [groups.tiles(32 if groups.depth <= 32 else 16, 8, 1), groups.tiles(16, 8), groups.tiles(16, 4)]
    elif q.of.dtype == torch.float32:
        candidates = [groups.tiles(32 if groups.depth <= 32 else 16, 8, 1), groups.tiles(16, 4)]
    elif groups.depth > 64:
        candidates = [groups.tiles(32, 8), groups.tiles(32, 4)]
    else:
        tokens = 64 if groups.branches == 1 else 32 if groups.depth <= 32 else 16
        candidates = [groups.tiles(tokens, 4), groups.tiles(64, 8), groups.tiles(32, 4, 1)]
    key = key_of(q.of, groups.depth, groups.window, groups.branches, *(["depthwise"] if depthwise is not None else []))
    tiles = config("gram", key, candidates, q.of.device)
    map_values = groups.pixels * groups.channels
    launch(
        gram_kernel, (groups.blocks * splits * groups.heads,), q.of, k.of, *weights, depthwise, slots,
        groups.height, groups.width, blocks_y, blocks_x, splits, **groups.constants,
        Q_PIXEL=q.pixel, Q_FIRST=q.first, K_PIXEL=k.pixel, K_FIRST=k.first,
        NORMS=norms, DEPTHWISE=depthwise is not None, PRECISION=precision(q.of), **tiles,
        work=Work(
            2 * map_values * q.of.element_size() + slots.numel() * 4,
            matrix=2 * groups.branches * map_values * groups.depth,
            vector=map_values * (8 * groups.branches + (36 if depthwise is not None else 0)),
        ),
    )  # fmt: skip
    return slots.sum(dim=1) if splits > 1 else slots[:, 0]


# ---- attention of windows -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def attend_fwd_kernel(
    slots, temperature, attention, windows_y, windows_x, blocks_y, blocks_x,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    DIVIDES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_s: (BLOCK_R of q, BLOCK_D of k); attention: (images, windows, HEADS, BRANCHES, DEPTH, DEPTH)
    PARTS: tl.constexpr = 2 if SHIFT > 0 else 1
    SLOT: tl.constexpr = BRANCHES * DEPTH * (DEPTH + 2)
    i_matrix = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    i_branch = i_matrix % BRANCHES
    p_s = o_r[:, None] * DEPTH + o_d[None, :]
    b_s = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    b_q = tl.zeros((BLOCK_R,), dtype=tl.float32)
    b_k = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for i_piece in tl.static_range(PARTS * PARTS):
        _, _, i_slot, rows = piece_of_window(
            i_piece, i_matrix, windows_y, windows_x, blocks_y, blocks_x, BRANCHES, HEADS, DEPTH, SHIFT
        )
        m_r, m_d = o_r < rows, o_d < rows
        p_slot = slots + i_slot * SLOT
        p_n = p_slot + DEPTH * (BRANCHES * DEPTH + 2 * i_branch)
        b_s += tl.load(p_slot + i_branch * DEPTH * DEPTH + p_s, mask=m_r[:, None] & m_d[None, :], other=0.0)
        b_q += tl.load(p_n + o_r, mask=m_r, other=0.0)
        b_k += tl.load(p_n + DEPTH + o_d, mask=m_d, other=0.0)
    i_head = i_matrix // BRANCHES % HEADS
    scale = tl.load(temperature + i_head).to(tl.float32)
    if DIVIDES:
        scale = 1.0 / scale
    b_q = 1.0 / tl.maximum(tl.sqrt_rn(b_q), 1e-12)
    b_k = 1.0 / tl.maximum(tl.sqrt_rn(b_k), 1e-12)
    b_s = b_s * b_q[:, None] * b_k[None, :] * scale
    m_r, m_d = o_r < DEPTH, o_d < DEPTH
    b_s = tl.where(m_d[None, :], b_s, float("-inf"))
    b_s = tl.exp(b_s - tl.max(b_s, axis=1)[:, None])
    b_s = b_s / tl.sum(b_s, axis=1)[:, None]
    p_a = attention + i_matrix * DEPTH * DEPTH + p_s
    tl.store(p_a, b_s.to(attention.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])


def attend(groups, slots, temperature, divides, dtype):
    """The attention matrices (matrices, depth, depth) of all windows, heads and branches."""
    depth = groups.depth
    attention = slots.new_empty(groups.matrices, depth, depth, dtype=dtype)
    block_d = block_of(depth)
    candidates = [dict(BLOCK_R=rows, BLOCK_D=block_d, num_warps=warps) for rows, warps in ((16, 4), (32, 4), (16, 2))]
    tiles = config("attend_fwd", key_of(slots, depth, groups.branches), candidates, slots.device)
    launch(
        attend_fwd_kernel, (groups.matrices, triton.cdiv(depth, tiles["BLOCK_R"])), slots, temperature, attention,
        *groups.windows_and_blocks, **groups.constants, DIVIDES=divides, **tiles,
        work=Work(slots.numel() * 4 + attention.numel() * attention.element_size(), vector=12 * attention.numel()),
    )  # fmt: skip
    return attention


# ---- the product with v ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    v, attention, weight_0, weight_1, depthwise, out, height, width, windows_y, windows_x, blocks_y, blocks_x, splits,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    V_PIXEL: tl.constexpr, V_FIRST: tl.constexpr, DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_v, b_o: (tile, BLOCK_D); b_a: (BLOCK_D of out, BLOCK_D of v)
    i_program = tl.program_id(0).to(tl.int64)
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
        o_y, o_x, m_t = tile_tokens(i_tile, y0, x0, y1, x1, TILE_Y, TILE_X)
        b_v = load_tokens(v, depthwise, i_image, o_y, o_x, m_t, V_FIRST + o_c, m_d, height, width, V_PIXEL, DEPTHWISE)
        b_o = dot(b_v, b_a0, None, PRECISION)
        if BRANCHES == 2:
            o_wy, o_wx = block_position(i_y, 0, P, SHIFT) + o_y - y0, block_position(i_x, 0, P, SHIFT) + o_x - x0
            b_w0 = load_weights(weight_0, i_head, o_wy, o_wx, m_t, P)
            b_w1 = load_weights(weight_1, i_head, o_wy, o_wx, m_t, P)
            b_o = b_o * b_w0[:, None] + dot(b_v, b_a1, None, PRECISION) * b_w1[:, None]
        p_o = out + ((i_image * height + o_y) * width + o_x)[:, None] * (HEADS * DEPTH) + o_c[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


def apply(groups, v, attention, weights, out, depthwise=None):
    """Writes the attention's product with `Channels` ``v``, merged by the weights of the branches.

    ``depthwise``: taps (9, channels of the map) of a convolution of ``v`` before it, in fp32.
    """
    if v.of.dtype == torch.float32:
        stages = 2 if groups.depth <= 32 else 1
        candidates = [
            groups.tiles(32, 8, stages) if depthwise is None else groups.tiles(16, 8, 1),
            groups.tiles(16, 8, 1),
        ]
    elif groups.depth > 64 or depthwise is not None:
        candidates = [groups.tiles(32, 8 if groups.depth > 64 else 4), groups.tiles(32, 4, 1)]
    else:
        candidates = [groups.tiles(64, 4), groups.tiles(128, 8), groups.tiles(32, 4)]
    key = key_of(v.of, groups.depth, groups.window, groups.branches, *(["depthwise"] if depthwise is not None else []))
    tiles = config("apply", key, candidates, v.of.device)
    windows_y, windows_x, blocks_y, blocks_x = groups.windows_and_blocks
    splits = groups.splits
    launch(
        apply_kernel, (groups.blocks * splits * groups.heads,), v.of, attention, *weights, depthwise, out,
        groups.height, groups.width, windows_y, windows_x, blocks_y, blocks_x, splits, **groups.constants,
        V_PIXEL=v.pixel, V_FIRST=v.first, DEPTHWISE=depthwise is not None, PRECISION=precision(v.of), **tiles,
        work=Work(
            (2 * out.numel() + attention.numel()) * out.element_size(),
            matrix=2 * groups.branches * out.numel() * groups.depth,
            vector=0 if depthwise is None else 18 * out.numel(),
        ),
    )  # fmt: skip
