"""Attention between the pixels of groups, dilated lattices or windows: the forward; see _lattice.py.

A program takes a block of queries of one head and goes through the group's keys; where one block holds all keys, it
does so for some neighbouring groups and reads the biases once. Pixels are gathered in place: 4 C values of memory
traffic a pixel (all blocks of queries but the first find keys and values in the cache), 4 keys C FLOP. The backward is
in _attention_backward.py.
"""

import triton
import triton.language as tl

from ._dot import dot
from ._lattice import (
    SIZES,
    are_keys,
    biases,
    factor_of_scores,
    finite_shift,
    group_pixels,
    is_wide,
    key_rows,
    masked_scores,
    places_of_keys,
    query_rows,
    rows_of_scores,
)
from ._launch import Work, block_of, cdiv, config, launch


@triton.jit(do_not_specialize=SIZES)
def attention_fwd_kernel(
    q, k, v, bias, temperature, out, groups, count, height, width, key_height, key_width, down, across, scale,
    HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr,
    OVERLAPPING: tl.constexpr, PIXELS: tl.constexpr, FIRSTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_out: (BLOCK_Q, BLOCK_D); b_k, b_v: (BLOCK_K, BLOCK_D); b_s, b_p, b_bias: (BLOCK_Q, BLOCK_K)
    # PIXELS: channels of a pixel of the maps that q, k, v are in; FIRSTS: their first ones there
    TOKENS: tl.constexpr = KEYS[0] * KEYS[1]
    BLOCKS: tl.constexpr = (QUERIES[0] * QUERIES[1] + BLOCK_Q - 1) // BLOCK_Q
    C: tl.constexpr = HEADS * D
    i_block = tl.program_id(0) % BLOCKS
    i_head = tl.program_id(0) // BLOCKS % HEADS
    i_first = tl.program_id(0) // (BLOCKS * HEADS) * count
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = i_head * D + o_d
    o_q = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_query = query_rows(o_q, QUERIES, KEYS, TABLE)
    factor = factor_of_scores(temperature, i_head, scale)
    if TOKENS <= BLOCK_K:
        o_key = key_rows(tl.arange(0, BLOCK_K), KEYS, TABLE)
        b_bias = biases(bias, o_query[:, None] - o_key[None, :], i_head, HEADS, QUERIES, KEYS, TABLE)
    for i_group in range(i_first, tl.minimum(i_first + count, groups)):
        o_row, m_q = group_pixels(i_group, o_q, height, width, down, across, QUERIES)
        m_rows = m_q[:, None] & m_d[None, :]
        b_q = tl.load(q + FIRSTS[0] + o_row[:, None] * PIXELS[0] + o_c[None, :], mask=m_rows, other=0.0)
        b_q = rows_of_scores(b_q, temperature)
        b_max = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        b_out = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
        for i_k in range(0, TOKENS, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            o_pixel, m_k = group_pixels(i_group, o_k, key_height, key_width, down, across, KEYS)
            m_x = m_k[:, None] & m_d[None, :]
            p_k, p_v = places_of_keys(k, v, o_pixel, o_c, PIXELS, FIRSTS)
            b_k = rows_of_scores(tl.load(p_k, mask=m_x, other=0.0), temperature)
            b_v = tl.load(p_v, mask=m_x, other=0.0)
            if TOKENS > BLOCK_K:
                o_key = key_rows(o_k, KEYS, TABLE)
                b_bias = biases(bias, o_query[:, None] - o_key[None, :], i_head, HEADS, QUERIES, KEYS, TABLE)
            m_s = are_keys(o_k, m_k, KEYS, OVERLAPPING)[None, :]
            b_s = masked_scores(b_q, b_k, b_bias, m_s, factor, PRECISION)
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
    """Configurations: queries and keys a block, never much above what the lattices have."""
    block, keys = block_of(lattice.tokens), block_of(lattice.key_tokens)
    if is_wide(x, lattice):
        shapes = [(32, 32, 8, 1), (64, 32, 8, 1), (16, 64, 4, 1)]
    elif max(block, keys) <= 64:
        shapes = [(64, 64, 4, 1), (64, 64, 4, 2), (32, 64, 2, 1), (64, 64, 8, 1)]
    else:  # more keys a block need more registers than there are
        shapes = [(64, 64, 4, 1), (128, 64, 8, 1), (64, 32, 4, 2), (128, 64, 8, 2), (64, 128, 4, 1)]
    # Without a limit the compiler would spill for the sake of one more block.
    limit = dict(maxnreg=128) if is_wide(x, lattice) else {}
    return [
        dict(BLOCK_Q=min(q, block), BLOCK_K=min(k, keys), num_warps=warps, num_stages=stages, **limit)
        for q, k, warps, stages in shapes
    ]


def maps_of(q, k, v):
    """The maps that the `Channels` of queries, keys and values are in, None for that of keys once more."""
    return q.of, k.of, None if v.of is k.of else v.of


def places_of(q, k, v):
    """The constants that tell where in their maps they are."""
    return dict(PIXELS=(q.pixel, k.pixel, v.pixel), FIRSTS=(q.first, k.first, v.first))


def attention(lattice, q, k, v, bias=None, temperature=None, scale=1.0):
    """The result, a map, of `Channels` q, k and v; ``bias``: a table or dense; ``temperature``: for cosine."""
    batch, _, height, width = q.of.shape
    out = q.of.new_empty(batch, height, width, lattice.channels).permute(0, 3, 1, 2)
    key = lattice.key(q.of, bias, temperature)
    tiles = config(f"{lattice.operator}_fwd", key, _tiles(q.of, lattice), q.of.device)
    blocks = cdiv(lattice.tokens, tiles["BLOCK_Q"])
    count = 1
    if lattice.key_tokens <= tiles["BLOCK_K"]:  # with 2048 programs or more, each takes some groups
        count = min(8, max(1, lattice.groups * lattice.heads * blocks // 2048))
    keys = 2 * batch * k.of.shape[2] * k.of.shape[3] * lattice.channels
    launch(
        attention_fwd_kernel, (cdiv(lattice.groups, count) * lattice.heads * blocks,),
        *maps_of(q, k, v), bias, temperature, out, lattice.groups, count, *lattice.steps, scale,
        **lattice.constants(q.of), **places_of(q, k, v), **tiles,
        work=Work(
            (2 * out.numel() + keys) * out.element_size(), matrix=4 * lattice.scores * block_of(lattice.depth),
            vector=8 * lattice.scores,
        ),
    )  # fmt: skip
    return out
