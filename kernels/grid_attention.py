"""Attention on dilated lattices over the whole image; see ipt_fast.ops.grid_attention.

Forward: a program takes a block of queries of one head and goes through the group's keys; where one block holds all
keys, it does so for some neighbouring groups and reads the biases once. Pixels are gathered in place: 4 C values of
memory traffic a pixel (all blocks of queries but the first find keys and values in the cache), 4 tokens C FLOP. The
backward is in grid_attention_backward.py.
"""

import triton
import triton.language as tl

from ._dot import dot
from ._lattice import SIZES, bias_offsets, biases, finite_shift, group_pixels, is_wide, lattice_of, masked_scores
from ._launch import Work, block_of, cdiv, config, launch


@triton.jit(do_not_specialize=SIZES)
def grid_attention_fwd_kernel(
    qkv, table, out, groups, count, height, width, row_step, column_step, scale,
    HEADS: tl.constexpr, D: tl.constexpr, LATTICE: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_out: (BLOCK_Q, BLOCK_D); b_k, b_v: (BLOCK_K, BLOCK_D); b_s, b_p, b_bias: (BLOCK_Q, BLOCK_K)
    TOKENS: tl.constexpr = LATTICE * LATTICE
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_Q - 1) // BLOCK_Q
    C: tl.constexpr = HEADS * D
    i_block = tl.program_id(0) % BLOCKS
    i_head = tl.program_id(0) // BLOCKS % HEADS
    i_first = tl.program_id(0) // (BLOCKS * HEADS) * count
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = i_head * D + o_d
    o_q = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_query = bias_offsets(o_q, LATTICE, SIDE) + SIDE * SIDE // 2
    if TOKENS <= BLOCK_K:
        o_key = bias_offsets(tl.arange(0, BLOCK_K), LATTICE, SIDE)
        b_bias = biases(table, (o_query[:, None] - o_key[None, :]) * HEADS + i_head)
    for i_group in range(i_first, tl.minimum(i_first + count, groups)):
        o_row, m_q = group_pixels(i_group, o_q, height, width, row_step, column_step, LATTICE)
        m_rows = m_q[:, None] & m_d[None, :]
        b_q = tl.load(qkv + o_row[:, None] * (3 * C) + o_c[None, :], mask=m_rows, other=0.0)
        b_max = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        b_out = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
        for i_k in range(0, TOKENS, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            o_pixel, m_k = group_pixels(i_group, o_k, height, width, row_step, column_step, LATTICE)
            p_k = qkv + C + o_pixel[:, None] * (3 * C) + o_c[None, :]
            m_x = m_k[:, None] & m_d[None, :]
            b_k = tl.load(p_k, mask=m_x, other=0.0)
            b_v = tl.load(p_k + C, mask=m_x, other=0.0)
            if TOKENS > BLOCK_K:
                o_key = bias_offsets(o_k, LATTICE, SIDE)
                b_bias = biases(table, (o_query[:, None] - o_key[None, :]) * HEADS + i_head)
            b_s = masked_scores(b_q, b_k, b_bias, m_k[None, :], scale, PRECISION)
            b_largest = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_shift = finite_shift(b_largest)
            b_p = tl.exp2(b_s - b_shift[:, None])
            b_shrink = tl.exp2(b_max - b_shift)
            b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
            b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], PRECISION)
            b_max = b_largest
        p_out = out + o_row[:, None] * C + o_c[None, :]
        tl.store(p_out, (b_out / b_sum[:, None]).to(out.dtype.element_ty), mask=m_rows)


def _tiles(x, lattice):
    """Configurations: queries and keys a block, never much above what the lattice has."""
    block = block_of(lattice.tokens)
    if is_wide(x, lattice):
        shapes = [(32, 32, 8, 1), (64, 32, 8, 1), (16, 64, 4, 1)]
    elif block <= 64:
        shapes = [(64, 64, 4, 1), (64, 64, 4, 2), (32, 64, 2, 1), (64, 64, 8, 1)]
    else:  # more keys a block need more registers than there are
        shapes = [(64, 64, 4, 1), (128, 64, 8, 1), (64, 32, 4, 2), (128, 64, 8, 2), (64, 128, 4, 1)]
    # Without a limit the compiler would spill for the sake of one more block.
    limit = dict(maxnreg=128) if is_wide(x, lattice) else {}
    return [
        dict(BLOCK_Q=min(q, block), BLOCK_K=min(k, block), num_warps=warps, num_stages=stages, **limit)
        for q, k, warps, stages in shapes
    ]


def grid_attention(qkv, bias_table, num_heads, grid_size):
    lattice = lattice_of(qkv, qkv.shape[1] // 3, num_heads, grid_size)
    batch, _, height, width = qkv.shape
    out = qkv.new_empty(batch, height, width, lattice.channels).permute(0, 3, 1, 2)
    tiles = config("grid_attention_fwd", lattice.key(qkv, bias_table), _tiles(qkv, lattice), qkv.device)
    blocks = cdiv(lattice.tokens, tiles["BLOCK_Q"])
    scores = lattice.rows * num_heads * lattice.tokens
    count = 1
    if lattice.tokens <= tiles["BLOCK_K"]:  # with 2048 programs or more, each takes some groups
        count = min(8, max(1, lattice.groups * num_heads * blocks // 2048))
    launch(
        grid_attention_fwd_kernel, (cdiv(lattice.groups, count) * num_heads * blocks,),
        qkv, bias_table, out, lattice.groups, count, *lattice.steps, lattice.depth**-0.5,
        **lattice.constants(qkv), **tiles,
        work=Work(
            (qkv.numel() + out.numel()) * qkv.element_size(), matrix=4 * scores * block_of(lattice.depth),
            vector=8 * scores,
        ),
    )  # fmt: skip
    return out
