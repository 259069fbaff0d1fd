"""The backward of channel attention, between the gradient of its result and those of q, k, v and the weights.

With S = q^ k^T, A = softmax(scale S) and F = A v, the gradient of A is the Gram matrix of merge * grad and v. So: both
Gram matrices of every block (_gram.py; reads q, k, v and grad once for all branches); all that is d x d, for every
window; the gradients, products of each pixel with two matrices of each branch (reads q, k, v and grad again, writes
three maps, and with two branches four fp32 values for each pixel and head); and the sums of these over the windows.

Bytes a pixel: 11 C T, with C channels of T bytes, and the slots.
"""

import triton
import triton.language as tl

from ._attend import scales_of
from ._dot import dot
from ._gram import gram, of_branches
from ._launch import Work, block_of, cdiv, config, key_of, launch, precision
from ._windows import (
    SIZES,
    block_begin,
    block_end,
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

PARTS = 32  # in which the windows' gradients of weights are summed: a number of its own, for the same order everywhere


# ---- what is d x d --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def attend_bwd_kernel(
    slots, grad_slots, temperature, matrices, vectors, grad_scales,
    height, width, windows_y, windows_x, blocks_y, blocks_x,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    DIVIDES: tl.constexpr, SCALES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_s, b_g: (BLOCK_R of q, BLOCK_D of k). In fp64: the gradients of normalised vectors are differences of nearly
    # equal terms. matrices: (.., 2, DEPTH, DEPTH), the gradient of S in rows of largest value 1, and A; vectors:
    # (.., 5, DEPTH), 1 / |q|, 1 / |k|, what the norms take from the gradients of q^ and k^ for each unit of them, and
    # the rows' largest values.
    COUNT: tl.constexpr = 4 if SHIFT > 0 else 1
    SLOT: tl.constexpr = DEPTH * (BRANCHES * (DEPTH + 2) + 2)
    i_matrix = tl.program_id(0).to(tl.int64)
    i_branch = i_matrix % BRANCHES
    o_d = tl.arange(0, BLOCK_D)
    b_k = tl.zeros((BLOCK_D,), dtype=tl.float64)
    tokens = i_matrix * 0
    for i_piece in tl.static_range(COUNT):
        i_y, i_x, i_slot, depth = piece_of_window(
            i_piece, i_matrix, windows_y, windows_x, blocks_y, blocks_x, BRANCHES, HEADS, DEPTH, SHIFT
        )
        p_n = slots + i_slot * SLOT + DEPTH * (BRANCHES * DEPTH + 2 * i_branch)
        p_f = slots + i_slot * SLOT + DEPTH * BRANCHES * (DEPTH + 2)
        b_u = 1.0 / tl.load(p_f + DEPTH + o_d, mask=o_d < depth, other=1.0).to(tl.float64)
        b_k += tl.load(p_n + DEPTH + o_d, mask=o_d < depth, other=0.0).to(tl.float64) * b_u * b_u
        rows = block_end(i_y, height, P[0], SHIFT) - block_begin(i_y, P[0], SHIFT)
        columns = block_end(i_x, width, P[1], SHIFT) - block_begin(i_x, P[1], SHIFT)
        tokens += tl.where(depth > 0, rows * columns, 0)
    m_k = tl.sqrt(b_k) < 1e-12  # no gradient comes of such a norm
    b_k = 1.0 / tl.maximum(tl.sqrt(b_k), 1e-12)
    scale = tl.load(temperature + i_branch % SCALES * HEADS + i_matrix // BRANCHES % HEADS).to(tl.float64)
    if DIVIDES:
        scale = 1.0 / scale
    b_slope_k = tl.zeros((BLOCK_D,), dtype=tl.float64)
    b_grad_scale = tl.zeros((BLOCK_D,), dtype=tl.float64)
    p_matrix = matrices + i_matrix * 2 * DEPTH * DEPTH
    p_vector = vectors + i_matrix * 5 * DEPTH
    for i_row in range(0, DEPTH, BLOCK_R):
        o_r = i_row + tl.arange(0, BLOCK_R)
        p_s = o_r[:, None] * DEPTH + o_d[None, :]
        b_s = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float64)
        b_g = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float64)
        b_q = tl.zeros((BLOCK_R,), dtype=tl.float64)
        for i_piece in tl.static_range(COUNT):
            _, _, i_slot, depth = piece_of_window(
                i_piece, i_matrix, windows_y, windows_x, blocks_y, blocks_x, BRANCHES, HEADS, DEPTH, SHIFT
            )
            m_s = (o_r < depth)[:, None] & (o_d < depth)[None, :]
            p_slot = slots + i_slot * SLOT
            p_g = grad_slots + (i_slot * BRANCHES + i_branch) * DEPTH * DEPTH + p_s
            p_f = p_slot + DEPTH * BRANCHES * (DEPTH + 2)
            b_uq = 1.0 / tl.load(p_f + o_r, mask=o_r < depth, other=1.0).to(tl.float64)
            b_uk = 1.0 / tl.load(p_f + DEPTH + o_d, mask=o_d < depth, other=1.0).to(tl.float64)
            b_p = tl.load(p_slot + i_branch * DEPTH * DEPTH + p_s, mask=m_s, other=0.0).to(tl.float64)
            b_s += b_p * b_uq[:, None] * b_uk[None, :]
            b_g += tl.load(p_g, mask=m_s, other=0.0).to(tl.float64)
            p_n = p_slot + DEPTH * (BRANCHES * DEPTH + 2 * i_branch)
            b_q += tl.load(p_n + o_r, mask=o_r < depth, other=0.0).to(tl.float64) * b_uq * b_uq
        m_r = o_r < DEPTH
        m_s = m_r[:, None] & (o_d < DEPTH)[None, :]
        m_q = tl.sqrt(b_q) < 1e-12
        b_q = 1.0 / tl.maximum(tl.sqrt(b_q), 1e-12)
        b_s *= b_q[:, None] * b_k[None, :]
        b_a = tl.where((o_d < DEPTH)[None, :], b_s * scale, float("-inf"))
        b_a = tl.exp((b_a - tl.max(b_a, axis=1)[:, None]).to(tl.float32)).to(tl.float64)
        b_a = b_a / tl.sum(b_a, axis=1)[:, None]
        b_g = b_a * (b_g - tl.sum(b_a * b_g, axis=1)[:, None])
        b_grad_scale += tl.sum(tl.where(m_r[:, None], b_g * b_s, 0.0), axis=0)
        # a channel of one token is normalised to its sign, unless it is too small
        m_signs = (tokens == 1) & ~(m_q[:, None] | m_k[None, :])
        b_g = tl.where(m_s & ~m_signs, b_g * scale, 0.0)
        b_slope_k += tl.sum(b_g * b_s, axis=0)
        b_most = tl.max(tl.abs(b_g), axis=1)
        tl.store(p_vector + o_r, b_q.to(tl.float32), mask=m_r)
        b_slope_q = tl.where(m_q, 0.0, tl.sum(b_g * b_s, axis=1))
        tl.store(p_vector + 2 * DEPTH + o_r, b_slope_q.to(tl.float32), mask=m_r)
        tl.store(p_vector + 4 * DEPTH + o_r, b_most.to(tl.float32), mask=m_r)
        b_g = b_g / tl.where(b_most == 0.0, 1.0, b_most)[:, None]
        tl.store(p_matrix + p_s, b_g.to(tl.float32).to(matrices.dtype.element_ty), mask=m_s)
        tl.store(p_matrix + DEPTH * DEPTH + p_s, b_a.to(tl.float32).to(matrices.dtype.element_ty), mask=m_s)
    m_d = o_d < DEPTH
    tl.store(p_vector + DEPTH + o_d, b_k.to(tl.float32), mask=m_d)
    tl.store(p_vector + 3 * DEPTH + o_d, tl.where(m_k, 0.0, b_slope_k).to(tl.float32), mask=m_d)
    grad_scale = tl.sum(b_grad_scale, axis=0)
    if DIVIDES:
        grad_scale *= -scale * scale
    tl.store(grad_scales + i_matrix, grad_scale.to(tl.float32))


def attend_backward(groups, slots, grad_slots, temperature, divides, dtype):
    """Matrices and vectors of `attend_bwd_kernel`, and the gradient of the temperature."""
    depth = groups.depth
    windows_y, windows_x, _, _ = groups.windows_and_blocks
    matrices = slots.new_empty(groups.matrices, 2, depth, depth, dtype=dtype)
    vectors = slots.new_empty(groups.matrices, 5, depth)
    grad_scales = slots.new_empty(groups.images * windows_y * windows_x, groups.heads, groups.branches)
    candidates = [
        dict(BLOCK_R=16, BLOCK_D=block_of(depth), num_warps=warps) for warps in ((4, 8) if depth <= 32 else (8,))
    ]
    tiles = config("attend_bwd", key_of(slots, depth, groups.branches), candidates, slots.device)
    launch(
        attend_bwd_kernel, (groups.matrices,), slots, grad_slots, temperature, matrices, vectors, grad_scales,
        groups.height, groups.width, *groups.windows_and_blocks, **groups.constants, DIVIDES=divides,
        SCALES=scales_of(temperature), **tiles,
        work=Work(
            (slots.numel() + grad_slots.numel()) * 4 + matrices.numel() * matrices.element_size(),
            vector=20 * matrices.numel(),
        ),
    )  # fmt: skip
    if not groups.cyclic:  # windows over an edge do not exist
        of_bottom = grad_scales.view(groups.images, windows_y, windows_x, groups.heads, groups.branches)[..., 1]
        of_bottom[:, -1] = 0.0
        of_bottom[:, :, -1] = 0.0
    if temperature.dim() == 1:
        return matrices, vectors, grad_scales.sum(dim=(0, 2))
    return matrices, vectors, grad_scales.sum(dim=0).t()


# ---- what is a value of each pixel ----------------------------------------------------------------------------------


@triton.jit
def store_sums(sums, b_sum, i_map, i_head, p_t, m_t, pixels, HEADS: tl.constexpr):
    tl.store(sums + (i_map * HEADS + i_head).to(tl.int64) * pixels + p_t, b_sum, mask=m_t)


@triton.jit
def gradient_of_branch(b_x, b_y, b_w, p_matrix, p_vector, o_d, OF_K: tl.constexpr, DEPTH: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    # of w x (tile, BLOCK_D), and its share in that of w (tile,); x is q and y is k, or the reverse where OF_K. With g
    # the gradient of x^, a product of y^, it is g - (g . x^) x^ over the norm of x.
    m_d = o_d < DEPTH
    p_g = p_matrix + o_d[:, None] * DEPTH + o_d[None, :]
    b_matrix = tl.load(p_g, mask=m_d[:, None] & m_d[None, :], other=0.0)
    b_nx = tl.load(p_vector + OF_K * DEPTH + o_d, mask=m_d, other=0.0)
    b_ny = tl.load(p_vector + (1 - OF_K) * DEPTH + o_d, mask=m_d, other=0.0)
    b_slope = tl.load(p_vector + (2 + OF_K) * DEPTH + o_d, mask=m_d, other=0.0)
    b_most = tl.load(p_vector + 4 * DEPTH + o_d, mask=m_d, other=0.0)
    b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32) * (b_w[:, None] * b_ny[None, :])
    if OF_K:  # the rows' largest values may not fit fp16, the sums over rows then need one factor for all
        most = tl.max(b_most, axis=0)
        b_y *= (b_most / tl.where(most == 0.0, 1.0, most))[None, :]
        b_g = dot(b_y.to(b_matrix.dtype), b_matrix, None, PRECISION) * most
    else:
        b_g = dot(b_y.to(b_matrix.dtype), tl.trans(b_matrix), None, PRECISION) * b_most[None, :]
    b_g = (b_g - b_x * (b_w[:, None] * (b_nx * b_slope)[None, :])) * b_nx[None, :]
    return b_g, tl.sum(b_g * b_x, axis=1)


@triton.jit
def add_gradient(b_total, b_x, b_y, b_w, p_matrix, p_vector, o_d, OF_K: tl.constexpr, DEPTH: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    # adds what a branch has to the gradient of x; with its share in the gradient of the branch's token weights w
    b_g, b_sum = gradient_of_branch(b_x, b_y, b_w, p_matrix, p_vector, o_d, OF_K, DEPTH, PRECISION)
    return b_total + b_g * b_w[:, None], b_sum


@triton.jit
def add_gradient_of_v(b_total, b_g, b_v, b_w, p_attention, m_a, PRECISION: tl.constexpr):
    # the same of v, and the gradient of the branch's merge weights w
    b_gv = dot(b_g, tl.load(p_attention, mask=m_a, other=0.0), None, PRECISION)
    return b_total + b_gv * b_w[:, None], tl.sum(b_gv * b_v.to(tl.float32), axis=1)


@triton.jit
def position_of_branch(i_block, i_branch, P: tl.constexpr, SHIFT: tl.constexpr):
    return tl.where(i_branch == 0, block_position(i_block, 0, P, SHIFT), block_position(i_block, 1, P, SHIFT))


@triton.jit(do_not_specialize=[*SIZES, "pixels"])
def gradients_kernel(
    grad, q, k, v, token_weight, weight_0, weight_1, matrices, vectors, grad_q, grad_k, grad_v, sums,
    height, width, windows_y, windows_x, blocks_y, blocks_x, splits, pixels,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    CYCLIC: tl.constexpr, TOKEN_WEIGHTS: tl.constexpr, PIXEL: tl.constexpr, Q_FIRST: tl.constexpr,
    K_FIRST: tl.constexpr, V_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # tiles of maps: (tile, BLOCK_D); token_weight: (TOKEN_WEIGHTS, HEADS, *P), of both branches or of each; sums: (4,
    # HEADS, pixels), of both branches' token weights, then merge weights; those of a branch that a block does not have
    # stay unwritten, and those of its only merge weight, which is 1, mean nothing
    CHANNELS: tl.constexpr = HEADS * DEPTH
    i_program = tl.program_id(0)
    i_head, i_split, i_image, i_y, i_x, y0, y1, x0, x1 = block_of_program(
        i_program, height, width, blocks_y, blocks_x, splits, HEADS, P, SHIFT
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DEPTH
    m_a = m_d[:, None] & m_d[None, :]
    o_c = i_head * DEPTH + o_d
    i_0 = matrix_of(i_image, i_y, i_x, i_head, windows_y, windows_x, 0, BRANCHES, HEADS, SHIFT)
    i_1 = matrix_of(i_image, i_y, i_x, i_head, windows_y, windows_x, BRANCHES - 1, BRANCHES, HEADS, SHIFT)
    p_a = matrices + DEPTH * DEPTH + o_d[:, None] * DEPTH + o_d[None, :]
    first, last = tile_range(i_split, splits, y0, x0, y1, x1, TILE_Y, TILE_X)
    for i_tile in range(first, last):
        i_ty, i_tx, o_y, o_x, m_t = tile_of(i_tile, y0, x0, y1, x1, TILE_Y, TILE_X)
        tile = i_image, i_ty, i_tx, o_y, o_x, m_t
        p_t = (i_image.to(tl.int64) * height + i_ty) * width + i_tx + (o_y * width + o_x)
        m_x = m_t[:, None] & m_d[None, :]
        p_x = token_offsets(i_image, i_ty, i_tx, o_y, o_x, o_c, height, width, PIXEL)
        b_g = load_tokens(grad, None, *tile, o_c, m_d, height, width, CHANNELS, False)
        b_v = load_tokens(v, None, *tile, V_FIRST + o_c, m_d, height, width, PIXEL, False)
        b_q = load_tokens(q, None, *tile, Q_FIRST + o_c, m_d, height, width, PIXEL, False)
        b_k = load_tokens(k, None, *tile, K_FIRST + o_c, m_d, height, width, PIXEL, False)
        if BRANCHES == 1:
            p_m, p_v = matrices + i_0 * 2 * DEPTH * DEPTH, vectors + i_0 * 5 * DEPTH
            b_w = tl.where(m_t, 1.0, 0.0)
            b_gv = dot(b_g, tl.load(p_a + i_0 * 2 * DEPTH * DEPTH, mask=m_a, other=0.0), None, PRECISION)
            b_gq, _ = gradient_of_branch(b_q, b_k, b_w, p_m, p_v, o_d, False, DEPTH, PRECISION)
            b_gk, _ = gradient_of_branch(b_k, b_q, b_w, p_m, p_v, o_d, True, DEPTH, PRECISION)
        else:
            b_gv = tl.zeros((TILE_Y * TILE_X, BLOCK_D), dtype=tl.float32)
            b_gq = tl.zeros((TILE_Y * TILE_X, BLOCK_D), dtype=tl.float32)
            b_gk = tl.zeros((TILE_Y * TILE_X, BLOCK_D), dtype=tl.float32)
            o_wy = block_position(i_y, 0, P, SHIFT) + i_ty - y0 + o_y
            o_wx = block_position(i_x, 0, P, SHIFT) + i_tx - x0 + o_x
            inside = is_inside(i_y, i_x, height, width, P)
            # A loop, so that one branch's values are in registers at a time.
            for i_branch in tl.range(0, BRANCHES if CYCLIC else tl.where(inside, 2, 1), disable_licm=True):
                i_matrix = tl.where(i_branch == 0, i_0, i_1)
                p_m, p_v = matrices + i_matrix * 2 * DEPTH * DEPTH, vectors + i_matrix * 5 * DEPTH
                # Both merge weights are laid out by the unshifted windows, token weights by the branch's own.
                b_w = load_weights(tl.where(i_branch == 0, weight_0, weight_1), i_head, o_wy, o_wx, m_t, P)
                if not CYCLIC:
                    b_w = tl.where(inside, b_w, 1.0)
                b_gv, b_sum = add_gradient_of_v(b_gv, b_g, b_v, b_w, p_a + i_matrix * 2 * DEPTH * DEPTH, m_a, PRECISION)
                store_sums(sums, b_sum, 2 + i_branch, i_head, p_t, m_t, pixels, HEADS)
                o_by = position_of_branch(i_y, i_branch, P, SHIFT) + i_ty - y0 + o_y
                o_bx = position_of_branch(i_x, i_branch, P, SHIFT) + i_tx - x0 + o_x
                p_w = token_weight + i_branch % TOKEN_WEIGHTS * (HEADS * P[0] * P[1])
                b_w = load_weights(p_w, i_head, o_by, o_bx, m_t, P)
                b_gq, b_of_q = add_gradient(b_gq, b_q, b_k, b_w, p_m, p_v, o_d, False, DEPTH, PRECISION)
                b_gk, b_of_k = add_gradient(b_gk, b_k, b_q, b_w, p_m, p_v, o_d, True, DEPTH, PRECISION)
                store_sums(sums, b_of_q + b_of_k, i_branch, i_head, p_t, m_t, pixels, HEADS)
        tl.store(grad_v + V_FIRST + p_x, b_gv.to(grad_v.dtype.element_ty), mask=m_x)
        tl.store(grad_q + Q_FIRST + p_x, b_gq.to(grad_q.dtype.element_ty), mask=m_x)
        tl.store(grad_k + K_FIRST + p_x, b_gk.to(grad_k.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=[*SIZES, "images", "parts"])
def weights_kernel(
    sums, parts_of_sums, images, height, width, windows_y, windows_x, parts,
    HEADS: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, CYCLIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # parts_of_sums: (parts, 4, HEADS, P * P); sums over every parts-th window
    i_part = tl.program_id(2)
    i_map = tl.program_id(1)  # (map, head)
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < P * P
    shift = tl.where(i_map // HEADS == 1, SHIFT, 0)
    border = tl.where(i_map // HEADS == 0, 0, SHIFT)
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for i_window in range(i_part, images * windows_y * windows_x, parts):
        o_y = (i_window // windows_x % windows_y * P + o_p // P + shift) % (windows_y * P)
        o_x = (i_window % windows_x * P + o_p % P + shift) % (windows_x * P)
        p_s = (i_map.to(tl.int64) * images + i_window // windows_x // windows_y) * height * width + o_y * width + o_x
        m_s = m_p & (o_y < height) & (o_x < width)
        if not CYCLIC:  # the border has the first branch only, without a merge weight
            m_s &= (o_y >= border) & (o_y < windows_y * P - border) & (o_x >= border) & (o_x < windows_x * P - border)
        b_sum += tl.load(sums + p_s, mask=m_s, other=0.0)
    tl.store(parts_of_sums + (i_part * 4 * HEADS + i_map) * P * P + o_p, b_sum, mask=m_p)


def weight_gradients(groups, sums, token_weight):
    """Of token_weight, in its form, top_weight and bottom_weight, (heads, p, p), in fp32."""
    p, (windows_y, windows_x, _, _) = groups.window[0], groups.windows_and_blocks
    parts = max(1, min(PARTS, groups.images * windows_y * windows_x))
    found = sums.new_empty(parts, 4, groups.heads, p, p)
    tiles = dict(BLOCK=min(256, block_of(p * p)), num_warps=4)
    launch(
        weights_kernel, (cdiv(p * p, tiles["BLOCK"]), 4 * groups.heads, parts), sums, found,
        groups.images, groups.height, groups.width, windows_y, windows_x, parts,
        HEADS=groups.heads, P=p, SHIFT=groups.shift, CYCLIC=groups.cyclic, **tiles,
        work=Work((sums.numel() + found.numel()) * 4, vector=sums.numel()),
    )  # fmt: skip
    found = found.sum(dim=0)
    return found[:2] if token_weight.dim() == 4 else found[0] + found[1], found[2], found[3]


def gradients(groups, grad, q, k, v, grads, temperature, divides, weights=(None, None, None), slots=None):
    """Writes the gradients of `Channels` q, k, v to the tensors ``grads``, which have the channels of q, k and v.

    ``slots``: of q and k, if they are known. Returns the gradients of the temperature and of the weights (token, top,
    bottom), None without them.
    """
    token_weight, *merge = weights
    if groups.branches == 2 and merge[0].dtype != merge[1].dtype:  # one loop reads both
        merge = [weight.float() for weight in merge]
    if slots is None:
        slots = gram(groups, q, k, of_branches(token_weight))
    grad_slots = gram(groups, grad, v, merge, norms=False)
    matrices, vectors, grad_temperature = attend_backward(groups, slots, grad_slots, temperature, divides, q.of.dtype)
    sums = None
    if groups.branches == 2:
        sums = vectors.new_empty(4, groups.heads, groups.pixels)
    if q.of.element_size() == 4 or groups.depth > 64:
        shapes = [(32 if groups.depth <= 32 else 16, 8, 1), (16, 4, 1)]
    elif groups.depth <= 32:
        shapes = [(64, 8, 1), (16, 4, 1), (16, 8, 1)]
    else:
        shapes = [(32, 8, 2), (16, 4, 1), (16, 8, 1)]
    candidates = [groups.tiles(*shape) for shape in shapes]
    tiles = config("gradients", key_of(q.of, groups.depth, groups.label, groups.branches), candidates, q.of.device)
    windows_y, windows_x, blocks_y, blocks_x = groups.windows_and_blocks
    splits = groups.splits
    map_values = groups.pixels * groups.channels
    launch(
        gradients_kernel, (groups.blocks * splits * groups.heads,), grad.of, q.of, k.of, v.of, token_weight, *merge,
        matrices, vectors, *grads, sums,
        groups.height, groups.width, windows_y, windows_x, blocks_y, blocks_x, splits, groups.pixels,
        **groups.constants, CYCLIC=groups.cyclic, TOKEN_WEIGHTS=1 if token_weight is None else token_weight.dim() - 2,
        PIXEL=q.pixel, Q_FIRST=q.first, K_FIRST=k.first, V_FIRST=v.first,
        PRECISION=precision(q.of), **tiles,
        work=Work(
            (7 * map_values + matrices.numel()) * q.of.element_size() + (0 if sums is None else sums.numel() * 4),
            matrix=6 * groups.branches * map_values * groups.depth, vector=30 * groups.branches * map_values,
        ),
    )  # fmt: skip
    return grad_temperature, None if sums is None else weight_gradients(groups, sums, token_weight)
