"""Gradients of attention on dilated lattices: scores are computed again, nothing is added atomically.

A lattice that fits one block: a program takes one head and a fixed share of the groups, and gathers queries, keys,
values and the output's gradient once: 7 C values a pixel, 10 tokens C FLOP.

Larger lattices, in two passes, so that no sum leaves the chip: first the queries' gradients and the softmax's
statistics, by blocks of queries, then those of keys and values, by blocks of keys: 14 tokens C FLOP.

Gradients of scores are added up over a program's groups in registers (in memory, each by the one program that owns it,
where one block does not hold the queries of a lattice); PyTorch adds up the programs, and a last kernel the pairs of
tokens that share an entry of the bias table.
"""

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._lattice import (
    SIZES,
    as_operand,
    bias_offsets,
    biases,
    finite_shift,
    group_pixels,
    is_wide,
    lattice_of,
    masked_scores,
)
from ._launch import Work, block_of, cdiv, config, launch

# Shares of the groups: numbers of their own, so that sums are in the same order on every GPU. One program takes a share
# of a head and a block of keys.
PROGRAMS = 1024
PROGRAMS_OF_BLOCKS = 64


@triton.jit(do_not_specialize=SIZES)
def grid_attention_bwd_kernel(
    grad, qkv, table, grad_qkv, sums, groups, height, width, row_step, column_step, scale,
    HEADS: tl.constexpr, D: tl.constexpr, LATTICE: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_k, b_v, b_g and their gradients: (BLOCK_T, BLOCK_D); b_s, b_p, b_dp, b_ds: (queries, keys)
    TOKENS: tl.constexpr = LATTICE * LATTICE
    C: tl.constexpr = HEADS * D
    i_head = tl.program_id(0) % HEADS
    i_share = tl.program_id(0) // HEADS
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = i_head * D + o_d
    o_t = tl.arange(0, BLOCK_T)
    o_table = bias_offsets(o_t, LATTICE, SIDE)
    b_bias = biases(table, (o_table[:, None] - o_table[None, :] + SIDE * SIDE // 2) * HEADS + i_head)
    b_sums = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for i_group in range(i_share, groups, SHARES):
        o_pixel, m_t = group_pixels(i_group, o_t, height, width, row_step, column_step, LATTICE)
        o_x = o_pixel[:, None] * (3 * C) + o_c[None, :]
        m_x = m_t[:, None] & m_d[None, :]
        b_q = tl.load(qkv + o_x, mask=m_x, other=0.0)
        b_k = tl.load(qkv + o_x + C, mask=m_x, other=0.0)
        b_v = tl.load(qkv + o_x + 2 * C, mask=m_x, other=0.0)
        b_g = tl.load(grad + o_pixel[:, None] * C + o_c[None, :], mask=m_x, other=0.0)
        b_s = masked_scores(b_q, b_k, b_bias, m_t[None, :], scale, PRECISION)
        b_p = tl.exp2(b_s - finite_shift(tl.max(b_s, axis=1))[:, None])
        b_p *= (1.0 / tl.sum(b_p, axis=1))[:, None]
        b_dp = dot(b_g, tl.trans(b_v), None, PRECISION)
        b_dv = dot(tl.trans(b_p.to(b_g.dtype)), b_g, None, PRECISION)
        tl.store(grad_qkv + o_x + 2 * C, b_dv.to(grad_qkv.dtype.element_ty), mask=m_x)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, axis=1)[:, None])
        if table is not None:
            b_sums += b_ds
        b_ds, b_factor = as_operand(b_ds, b_q.dtype)
        b_dq = dot(b_ds, b_k, None, PRECISION) * (b_factor * scale)
        tl.store(grad_qkv + o_x, b_dq.to(grad_qkv.dtype.element_ty), mask=m_x)
        b_dk = dot(tl.trans(b_ds), b_q, None, PRECISION) * (b_factor * scale)
        tl.store(grad_qkv + o_x + C, b_dk.to(grad_qkv.dtype.element_ty), mask=m_x)
    if table is not None:
        p_sums = sums + tl.program_id(0).to(tl.int64) * (TOKENS * TOKENS) + o_t[None, :] * TOKENS + o_t[:, None]
        m_t = o_t < TOKENS
        tl.store(p_sums, b_sums, mask=m_t[None, :] & m_t[:, None])


@triton.jit
def _keys_of_queries(
    qkv, table, b_q, b_g, o_query, i_k, i_group, i_head, height, width, row_step, column_step, scale,
    HEADS: tl.constexpr, D: tl.constexpr, LATTICE: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # a block of keys (BLOCK_K, BLOCK_D), its scores and the gradients of its weights (BLOCK_Q, BLOCK_K)
    C: tl.constexpr = HEADS * D
    o_d = tl.arange(0, BLOCK_D)
    o_k = i_k + tl.arange(0, BLOCK_K)
    o_pixel, m_k = group_pixels(i_group, o_k, height, width, row_step, column_step, LATTICE)
    p_k = qkv + C + i_head * D + o_pixel[:, None] * (3 * C) + o_d[None, :]
    m_x = m_k[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k, mask=m_x, other=0.0)
    b_v = tl.load(p_k + C, mask=m_x, other=0.0)
    o_bias = (o_query[:, None] - bias_offsets(o_k, LATTICE, SIDE)[None, :]) * HEADS + i_head
    b_s = masked_scores(b_q, b_k, biases(table, o_bias), m_k[None, :], scale, PRECISION)
    return b_k, b_s, dot(b_g, tl.trans(b_v), None, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def grid_attention_bwd_queries_kernel(
    grad, qkv, table, grad_qkv, statistics, height, width, row_step, column_step, scale,
    HEADS: tl.constexpr, D: tl.constexpr, LATTICE: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_g, b_dq: (BLOCK_Q, BLOCK_D); b_k: (BLOCK_K, BLOCK_D); b_s, b_p, b_dp, b_ds: (BLOCK_Q, BLOCK_K);
    # statistics: (groups, HEADS, 3, TOKENS), of a query: its largest score, 1 / the sum of powers, the mean of b_dp
    TOKENS: tl.constexpr = LATTICE * LATTICE
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_Q - 1) // BLOCK_Q
    C: tl.constexpr = HEADS * D
    i_block = tl.program_id(0) % BLOCKS
    i_head = tl.program_id(0) // BLOCKS % HEADS
    i_group = tl.program_id(0) // (BLOCKS * HEADS)
    o_d = tl.arange(0, BLOCK_D)
    o_q = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_pixel, m_q = group_pixels(i_group, o_q, height, width, row_step, column_step, LATTICE)
    m_rows = m_q[:, None] & (o_d < D)[None, :]
    o_rows = o_pixel[:, None] * (3 * C) + (i_head * D + o_d)[None, :]
    b_q = tl.load(qkv + o_rows, mask=m_rows, other=0.0)
    b_g = tl.load(grad + o_pixel[:, None] * C + (i_head * D + o_d)[None, :], mask=m_rows, other=0.0)
    o_query = bias_offsets(o_q, LATTICE, SIDE) + SIDE * SIDE // 2
    if TOKENS <= BLOCK_K:
        b_k, b_s, b_dp = _keys_of_queries(
            qkv, table, b_q, b_g, o_query, 0, i_group, i_head, height, width, row_step, column_step, scale,
            HEADS, D, LATTICE, SIDE, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        b_shift = finite_shift(tl.max(b_s, axis=1))
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_inverse = 1.0 / tl.sum(b_p, axis=1)
        b_p *= b_inverse[:, None]
        b_mean = tl.sum(b_p * b_dp, axis=1)
        b_ds, b_factor = as_operand(b_p * (b_dp - b_mean[:, None]), b_q.dtype)
        b_dq = dot(b_ds, b_k, None, PRECISION) * b_factor
    else:
        b_max = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        b_mean = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        for i_k in range(0, TOKENS, BLOCK_K):
            b_k, b_s, b_dp = _keys_of_queries(
                qkv, table, b_q, b_g, o_query, i_k, i_group, i_head, height, width, row_step, column_step, scale,
                HEADS, D, LATTICE, SIDE, PRECISION, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            b_largest = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_shift = finite_shift(b_largest)
            b_p = tl.exp2(b_s - b_shift[:, None])
            b_shrink = tl.exp2(b_max - b_shift)
            b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
            b_mean = b_mean * b_shrink + tl.sum(b_p * b_dp, axis=1)
            b_max = b_largest
        b_shift = finite_shift(b_max)
        b_inverse = 1.0 / b_sum
        b_mean *= b_inverse
        b_dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
        for i_k in range(0, TOKENS, BLOCK_K):
            b_k, b_s, b_dp = _keys_of_queries(
                qkv, table, b_q, b_g, o_query, i_k, i_group, i_head, height, width, row_step, column_step, scale,
                HEADS, D, LATTICE, SIDE, PRECISION, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            b_p = tl.exp2(b_s - b_shift[:, None]) * b_inverse[:, None]
            b_ds, b_factor = as_operand(b_p * (b_dp - b_mean[:, None]), b_q.dtype)
            b_dq += dot(b_ds, b_k, None, PRECISION) * b_factor
    p_statistics = statistics + (i_group * HEADS + i_head).to(tl.int64) * (3 * TOKENS) + o_q
    tl.store(p_statistics, b_shift, mask=o_q < TOKENS)
    tl.store(p_statistics + TOKENS, b_inverse, mask=o_q < TOKENS)
    tl.store(p_statistics + 2 * TOKENS, b_mean, mask=o_q < TOKENS)
    tl.store(grad_qkv + o_rows, (b_dq * scale).to(grad_qkv.dtype.element_ty), mask=m_rows)


@triton.jit(do_not_specialize=SIZES)
def grid_attention_bwd_keys_kernel(
    grad, qkv, table, statistics, grad_qkv, sums, groups, height, width, row_step, column_step, scale,
    HEADS: tl.constexpr, D: tl.constexpr, LATTICE: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_k, b_v, b_dk, b_dv: (BLOCK_K, BLOCK_D); b_q, b_g: (BLOCK_Q, BLOCK_D); b_s, b_p, b_ds: (BLOCK_K, BLOCK_Q)
    TOKENS: tl.constexpr = LATTICE * LATTICE
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_K - 1) // BLOCK_K
    C: tl.constexpr = HEADS * D
    i_block = tl.program_id(0) % BLOCKS
    i_head = tl.program_id(0) // BLOCKS % HEADS
    i_share = tl.program_id(0) // (BLOCKS * HEADS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = i_head * D + o_d
    o_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    o_key = bias_offsets(o_k, LATTICE, SIDE) - SIDE * SIDE // 2
    p_sums = sums
    if table is not None:
        p_sums += (i_share * HEADS + i_head).to(tl.int64) * (TOKENS * TOKENS)
    b_sums = tl.zeros((BLOCK_K, BLOCK_Q), dtype=tl.float32)
    if TOKENS <= BLOCK_Q:
        o_query = bias_offsets(tl.arange(0, BLOCK_Q), LATTICE, SIDE)
        b_bias = biases(table, (o_query[None, :] - o_key[:, None]) * HEADS + i_head)
    for i_group in range(i_share, groups, SHARES):
        o_pixel, m_k = group_pixels(i_group, o_k, height, width, row_step, column_step, LATTICE)
        o_x = o_pixel[:, None] * (3 * C) + o_c[None, :]
        m_x = m_k[:, None] & m_d[None, :]
        b_k = tl.load(qkv + o_x + C, mask=m_x, other=0.0)
        b_v = tl.load(qkv + o_x + 2 * C, mask=m_x, other=0.0)
        b_dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        b_dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        p_statistics = statistics + (tl.zeros((1,), dtype=tl.int64) + i_group * HEADS + i_head) * (3 * TOKENS)
        for i_q in range(0, TOKENS, BLOCK_Q):
            o_q = i_q + tl.arange(0, BLOCK_Q)
            o_row, m_q = group_pixels(i_group, o_q, height, width, row_step, column_step, LATTICE)
            m_rows = m_q[:, None] & m_d[None, :]
            b_q = tl.load(qkv + o_row[:, None] * (3 * C) + o_c[None, :], mask=m_rows, other=0.0)
            b_g = tl.load(grad + o_row[:, None] * C + o_c[None, :], mask=m_rows, other=0.0)
            b_shift = tl.load(p_statistics + o_q, mask=m_q, other=0.0)
            b_inverse = tl.load(p_statistics + TOKENS + o_q, mask=m_q, other=0.0)
            b_mean = tl.load(p_statistics + 2 * TOKENS + o_q, mask=m_q, other=0.0)
            if TOKENS > BLOCK_Q:
                o_query = bias_offsets(o_q, LATTICE, SIDE)
                b_bias = biases(table, (o_query[None, :] - o_key[:, None]) * HEADS + i_head)
            b_s = masked_scores(b_k, b_q, b_bias, m_k[:, None] & m_q[None, :], scale, PRECISION)
            b_p = tl.exp2(b_s - b_shift[None, :]) * b_inverse[None, :]
            b_dv = dot(b_p.to(b_g.dtype), b_g, b_dv, PRECISION)
            b_dp = dot(b_v, tl.trans(b_g), None, PRECISION)
            b_ds = b_p * (b_dp - b_mean[None, :])
            if table is not None:
                if TOKENS <= BLOCK_Q:
                    b_sums += b_ds
                else:
                    o_sums = o_k[:, None] * TOKENS + o_q[None, :]
                    m_sums = (o_k < TOKENS)[:, None] & (o_q < TOKENS)[None, :]
                    b_before = tl.load(p_sums + o_sums, mask=m_sums, other=0.0)
                    tl.store(p_sums + o_sums, b_before + b_ds, mask=m_sums)
            b_ds, b_factor = as_operand(b_ds, b_q.dtype)
            b_dk += dot(b_ds, b_q, None, PRECISION) * b_factor
        tl.store(grad_qkv + o_x + C, (b_dk * scale).to(grad_qkv.dtype.element_ty), mask=m_x)
        tl.store(grad_qkv + o_x + 2 * C, b_dv.to(grad_qkv.dtype.element_ty), mask=m_x)
        if table is not None and TOKENS > BLOCK_Q:
            tl.debug_barrier()  # the next group adds to what other threads may have stored
    if table is not None and TOKENS <= BLOCK_Q:
        o_q = tl.arange(0, BLOCK_Q)
        m_sums = (o_k < TOKENS)[:, None] & (o_q < TOKENS)[None, :]
        tl.store(p_sums + o_k[:, None] * TOKENS + o_q[None, :], b_sums, mask=m_sums)


@triton.jit
def grid_attention_bwd_table_kernel(
    sums, grad_table, HEADS: tl.constexpr, LATTICE: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr
):
    # One program an entry: adds up sums (HEADS, keys, queries) over the queries that have a key at its distance.
    TOKENS: tl.constexpr = LATTICE * LATTICE
    i_entry = tl.program_id(0) // HEADS
    i_head = tl.program_id(0) % HEADS
    b_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for i_q in range(0, TOKENS, BLOCK_T):
        o_q = i_q + tl.arange(0, BLOCK_T)
        o_a = o_q // LATTICE - i_entry // SIDE + SIDE // 2
        o_b = o_q % LATTICE - i_entry % SIDE + SIDE // 2
        m_q = (o_q < TOKENS) & (o_a >= 0) & (o_a < LATTICE) & (o_b >= 0) & (o_b < LATTICE)
        p_sums = sums + i_head * (TOKENS * TOKENS) + (o_a * LATTICE + o_b).to(tl.int64) * TOKENS + o_q
        b_sum += tl.load(p_sums, mask=m_q, other=0.0)
    tl.store(grad_table + tl.program_id(0), tl.sum(b_sum, axis=0).to(grad_table.dtype.element_ty))


def _sums(lattice, shares, table, block):
    """Where programs leave the gradients of scores, or None; zeros where they add to it, block by block of queries."""
    if table is None:
        return None
    shape = (min(shares, lattice.groups), lattice.heads, lattice.tokens, lattice.tokens)
    make = torch.empty if block >= lattice.tokens else torch.zeros
    return make(shape, dtype=torch.float32, device=table.device)


def _table_gradient(sums, lattice, table):
    sums = sums.sum(dim=0)
    gradient = torch.empty_like(table)
    block = min(block_of(lattice.tokens), 1024)
    launch(
        grid_attention_bwd_table_kernel, (table.numel(),), sums, gradient,
        HEADS=lattice.heads, LATTICE=lattice.lattice, SIDE=lattice.side, BLOCK_T=block, num_warps=max(1, block // 256),
        work=Work(4 * (sums.numel() + table.numel()), vector=sums.numel()),
    )  # fmt: skip
    return gradient


def _one_block(x, lattice):
    """Configurations where all tokens are one block."""
    if is_wide(x, lattice):  # with a limit, as in the forward; a lower one spills
        limits = dict(num_warps=8, maxnreg=255), dict(num_warps=16)
    else:
        limits = dict(num_warps=4), dict(num_warps=8)
    return [dict(BLOCK_T=block_of(lattice.tokens), num_stages=1, **limit) for limit in limits]


def _query_tiles(x, lattice):
    block = block_of(lattice.tokens)
    if is_wide(x, lattice):
        shapes = [(64, 32, 8, 1) if lattice.depth > 32 else (32, 32, 4, 1), (16, 64, 4, 1), (32, 32, 8, 1)]
    else:
        shapes = [(64, 64, 4, 1), (32, 256, 8, 1), (64, 128, 8, 1), (128, 64, 8, 1), (32, 64, 4, 1)]
    return [
        dict(BLOCK_Q=q, BLOCK_K=min(k, block), num_warps=warps, num_stages=stages) for q, k, warps, stages in shapes
    ]


def _key_tiles(x, lattice, table):
    block = block_of(lattice.tokens)
    if is_wide(x, lattice):
        shapes = [(16, 32, 8, 1), (16, 32, 4, 1), (32, 32, 8, 1)]
    elif table is None:
        shapes = [(32, 64, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1), (64, 128, 8, 1)]
    else:
        shapes = [(256, 32, 8, 1), (256, 16, 8, 1), (256, 32, 16, 1)]
    return [
        dict(BLOCK_Q=min(q, block), BLOCK_K=k, num_warps=warps, num_stages=stages) for q, k, warps, stages in shapes
    ]


def grid_attention_backward(grad, qkv, bias_table, num_heads, grid_size):
    lattice = lattice_of(qkv, qkv.shape[1] // 3, num_heads, grid_size)
    grad_qkv = torch.empty_like(qkv)
    key, scale, constants = lattice.key(qkv, bias_table), lattice.depth**-0.5, lattice.constants(qkv)
    scores = lattice.rows * num_heads * lattice.tokens
    product = 2 * scores * block_of(lattice.depth)
    maps = (grad.numel() + 2 * qkv.numel()) * qkv.element_size()
    if lattice.tokens <= 64:
        shares = max(1, PROGRAMS // num_heads)
        tiles = config("grid_attention_bwd", key, _one_block(qkv, lattice), qkv.device)
        sums = _sums(lattice, shares, bias_table, tiles["BLOCK_T"])
        launch(
            grid_attention_bwd_kernel, (min(shares, lattice.groups) * num_heads,),
            grad, qkv, bias_table, grad_qkv, sums, lattice.groups, *lattice.steps, scale,
            SHARES=shares, **constants, **tiles,
            work=Work(maps + (0 if sums is None else 4 * sums.numel()), matrix=5 * product, vector=16 * scores),
        )  # fmt: skip
    else:
        statistics = torch.empty(lattice.groups, num_heads, 3, lattice.tokens, dtype=torch.float32, device=qkv.device)
        tiles = config("grid_attention_bwd_queries", key, _query_tiles(qkv, lattice), qkv.device)
        passes = 3 if tiles["BLOCK_K"] >= lattice.tokens else 5
        launch(
            grid_attention_bwd_queries_kernel,
            (lattice.groups * num_heads * cdiv(lattice.tokens, tiles["BLOCK_Q"]),),
            grad, qkv, bias_table, grad_qkv, statistics, *lattice.steps, scale, **constants, **tiles,
            work=Work(
                (grad.numel() + 4 * grad.numel()) * qkv.element_size() + 4 * statistics.numel(),
                matrix=passes * product, vector=passes // 2 * 10 * scores,
            ),
        )  # fmt: skip
        shares = max(1, PROGRAMS_OF_BLOCKS // num_heads)
        tiles = config("grid_attention_bwd_keys", key, _key_tiles(qkv, lattice, bias_table), qkv.device)
        if tiles["BLOCK_Q"] * tiles["BLOCK_K"] < 32 * tiles["num_warps"]:  # then several threads would hold a value
            raise ValueError(f"grid_attention_bwd_keys adds to its sums: a tile needs a value a thread; got {tiles}")
        sums = _sums(lattice, shares, bias_table, tiles["BLOCK_Q"])
        launch(
            grid_attention_bwd_keys_kernel,
            (min(shares, lattice.groups) * num_heads * cdiv(lattice.tokens, tiles["BLOCK_K"]),),
            grad, qkv, bias_table, statistics, grad_qkv, sums, lattice.groups, *lattice.steps, scale,
            SHARES=shares, **constants, **tiles,
            work=Work(
                (grad.numel() + 5 * grad.numel()) * qkv.element_size() + 4 * statistics.numel()
                + (0 if sums is None else 4 * sums.numel()),
                matrix=4 * product, vector=10 * scores,
            ),
        )  # fmt: skip
    return grad_qkv, None if bias_table is None else _table_gradient(sums, lattice, bias_table)
