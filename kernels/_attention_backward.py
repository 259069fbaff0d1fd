"""Attention between the pixels of groups: the backward. Scores are computed again, nothing is added atomically.

Groups that fit one block: a program takes one head and a fixed share of the groups, and gathers queries, keys, values
and the output's gradient once: 7 C values a pixel, 10 keys C FLOP.

Larger ones, in two passes, so that no sum leaves the chip: first the queries' gradients and the softmax's statistics,
by blocks of queries, then those of keys and values, by blocks of keys: 14 keys C FLOP. Where windows of keys overlap,
each writes its gradients in fp32, and a last kernel adds up those of a pixel.

Gradients of scores are added up over a program's groups in registers (in memory, each by the one program that owns it,
where one block does not hold the queries of a group); PyTorch adds up the programs, and a last kernel the pairs of
tokens that share an entry of the bias table.
"""

import torch
import triton
import triton.language as tl

from ._attention import maps_of, places_of
from ._attention_sums import bias_gradient, sums_of_scores
from ._dot import dot
from ._lattice import (
    SIZES,
    are_keys,
    as_operand,
    biases,
    factor_of_scores,
    finite_shift,
    gradient_of_rows,
    group_pixels,
    is_wide,
    key_rows,
    masked_scores,
    places_of_keys,
    query_rows,
    rows_of_scores,
)
from ._launch import Work, block_of, cdiv, config, launch

# Shares of the groups: numbers of their own, so that sums are in the same order on every GPU. One program takes a share
# of a head and a block of keys.
PROGRAMS = 1024
PROGRAMS_OF_BLOCKS = 64


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kernel(
    grad, q, k, v, bias, temperature, grad_q, grad_k, grad_v, sums, grad_factors,
    groups, height, width, key_height, key_width, down, across, scale,
    HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr,
    OVERLAPPING: tl.constexpr, PIXELS: tl.constexpr, FIRSTS: tl.constexpr, GRADS: tl.constexpr,
    PRECISION: tl.constexpr, SHARES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_g: (BLOCK_Q, BLOCK_D); b_k, b_v: (BLOCK_K, BLOCK_D), and their gradients; b_s, b_p, b_dp, b_ds: (queries,
    # keys); grad_factors: of the temperature, (SHARES, HEADS); GRADS: as PIXELS, of the maps of gradients
    C: tl.constexpr = HEADS * D
    i_head = tl.program_id(0) % HEADS
    i_share = tl.program_id(0) // HEADS
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = i_head * D + o_d
    o_q, o_k = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    o_query = query_rows(o_q, QUERIES, KEYS, TABLE)
    o_rows = o_query[:, None] - key_rows(o_k, KEYS, TABLE)[None, :]
    b_bias = biases(bias, o_rows, i_head, HEADS, QUERIES, KEYS, TABLE)
    factor = factor_of_scores(temperature, i_head, scale)
    b_sums = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
    b_factors = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for i_group in range(i_share, groups, SHARES):
        o_row, m_q = group_pixels(i_group, o_q, height, width, down, across, QUERIES)
        o_pixel, m_k = group_pixels(i_group, o_k, key_height, key_width, down, across, KEYS)
        m_rows, m_x = m_q[:, None] & m_d[None, :], m_k[:, None] & m_d[None, :]
        b_q = tl.load(q + FIRSTS[0] + o_row[:, None] * PIXELS[0] + o_c[None, :], mask=m_rows, other=0.0)
        p_k, p_v = places_of_keys(k, v, o_pixel, o_c, PIXELS, FIRSTS)
        b_k, b_v = tl.load(p_k, mask=m_x, other=0.0), tl.load(p_v, mask=m_x, other=0.0)
        b_g = tl.load(grad + o_row[:, None] * C + o_c[None, :], mask=m_rows, other=0.0)
        b_sq, b_sk = rows_of_scores(b_q, temperature), rows_of_scores(b_k, temperature)
        m_s = are_keys(o_k, m_k, KEYS, OVERLAPPING)[None, :]
        b_s = masked_scores(b_sq, b_sk, b_bias, m_s, factor, PRECISION)
        b_p = tl.exp2(b_s - finite_shift(tl.max(b_s, axis=1))[:, None])
        b_p *= (1.0 / tl.sum(b_p, axis=1))[:, None]
        b_dp = dot(b_g, tl.trans(b_v), None, PRECISION)
        b_dv = dot(tl.trans(b_p.to(b_g.dtype)), b_g, None, PRECISION)
        store_keys(grad_v, b_dv, FIRSTS[2], GRADS[2], o_pixel, i_group, o_k, o_c, m_x, m_d, C, KEYS, OVERLAPPING)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, axis=1)[:, None])
        if bias is not None:
            b_sums += b_ds
        b_ds, b_factor = as_operand(b_ds, b_q.dtype)
        b_dq, b_share = gradient_of_rows(dot(b_ds, b_sk, None, PRECISION) * b_factor, b_q, temperature, factor)
        p_q = FIRSTS[0] + o_row[:, None] * GRADS[0] + o_c[None, :]
        tl.store(grad_q + p_q, b_dq.to(grad_q.dtype.element_ty), mask=m_rows)
        if temperature is not None:
            b_factors += b_share
        b_dk = dot(tl.trans(b_ds), b_sq, None, PRECISION) * b_factor
        b_dk, _ = gradient_of_rows(b_dk, b_k, temperature, factor)
        store_keys(grad_k, b_dk, FIRSTS[1], GRADS[1], o_pixel, i_group, o_k, o_c, m_x, m_d, C, KEYS, OVERLAPPING)
    if bias is not None:
        TOKENS: tl.constexpr = QUERIES[0] * QUERIES[1]
        OF_KEYS: tl.constexpr = KEYS[0] * KEYS[1]
        p_sums = sums + tl.program_id(0).to(tl.int64) * (TOKENS * OF_KEYS) + o_k[None, :] * TOKENS + o_q[:, None]
        tl.store(p_sums, b_sums, mask=(o_k < OF_KEYS)[None, :] & (o_q < TOKENS)[:, None])
    if temperature is not None:
        tl.store(grad_factors + tl.program_id(0), tl.sum(b_factors, axis=0))


@triton.jit
def store_keys(
    grad_x, b_x, FIRST: tl.constexpr, PIXEL: tl.constexpr, o_pixel, i_group, o_k, o_c, m_x, m_d, C: tl.constexpr,
    KEYS: tl.constexpr, OVERLAPPING: tl.constexpr,
):  # fmt: skip
    # gradients of keys or values (BLOCK_K, BLOCK_D): in their map, or in the group's part of (groups, KEYS, C)
    if OVERLAPPING:
        TOKENS: tl.constexpr = KEYS[0] * KEYS[1]
        p_x = (i_group * TOKENS + o_k).to(tl.int64)[:, None] * C + o_c[None, :]
        m_x = (o_k < TOKENS)[:, None] & m_d[None, :]
    else:
        p_x = FIRST + o_pixel[:, None] * PIXEL + o_c[None, :]
    tl.store(grad_x + p_x, b_x.to(grad_x.dtype.element_ty), mask=m_x)


@triton.jit
def _keys_of_queries(
    k, v, bias, temperature, b_q, b_g, o_query, i_k, i_group, i_head, key_height, key_width, down, across, factor,
    HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr,
    OVERLAPPING: tl.constexpr, PIXELS: tl.constexpr, FIRSTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # a block of keys (BLOCK_K, BLOCK_D), its scores and the gradients of its weights (BLOCK_Q, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_head * D + o_d
    o_k = i_k + tl.arange(0, BLOCK_K)
    o_pixel, m_k = group_pixels(i_group, o_k, key_height, key_width, down, across, KEYS)
    m_x = m_k[:, None] & (o_d < D)[None, :]
    p_k, p_v = places_of_keys(k, v, o_pixel, o_c, PIXELS, FIRSTS)
    b_k = rows_of_scores(tl.load(p_k, mask=m_x, other=0.0), temperature)
    b_v = tl.load(p_v, mask=m_x, other=0.0)
    o_rows = o_query[:, None] - key_rows(o_k, KEYS, TABLE)[None, :]
    b_bias = biases(bias, o_rows, i_head, HEADS, QUERIES, KEYS, TABLE)
    m_s = are_keys(o_k, m_k, KEYS, OVERLAPPING)[None, :]
    b_s = masked_scores(b_q, b_k, b_bias, m_s, factor, PRECISION)
    return b_k, b_s, dot(b_g, tl.trans(b_v), None, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_queries_kernel(
    grad, q, k, v, bias, temperature, grad_q, statistics, grad_factors,
    height, width, key_height, key_width, down, across, scale,
    HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr,
    OVERLAPPING: tl.constexpr, PIXELS: tl.constexpr, FIRSTS: tl.constexpr, GRADS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_q, b_g, b_dq: (BLOCK_Q, BLOCK_D); b_k: (BLOCK_K, BLOCK_D); b_s, b_p, b_dp, b_ds: (BLOCK_Q, BLOCK_K);
    # statistics: (groups, HEADS, 3, TOKENS), of a query: its largest score, 1 / the sum of powers, the mean of b_dp;
    # grad_factors: of the temperature, (groups, HEADS, blocks)
    TOKENS: tl.constexpr = QUERIES[0] * QUERIES[1]
    OF_KEYS: tl.constexpr = KEYS[0] * KEYS[1]
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_Q - 1) // BLOCK_Q
    C: tl.constexpr = HEADS * D
    i_block = tl.program_id(0) % BLOCKS
    i_head = tl.program_id(0) // BLOCKS % HEADS
    i_group = tl.program_id(0) // (BLOCKS * HEADS)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_head * D + o_d
    o_q = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_row, m_q = group_pixels(i_group, o_q, height, width, down, across, QUERIES)
    m_rows = m_q[:, None] & (o_d < D)[None, :]
    b_raw = tl.load(q + FIRSTS[0] + o_row[:, None] * PIXELS[0] + o_c[None, :], mask=m_rows, other=0.0)
    b_q = rows_of_scores(b_raw, temperature)
    b_g = tl.load(grad + o_row[:, None] * C + o_c[None, :], mask=m_rows, other=0.0)
    o_query = query_rows(o_q, QUERIES, KEYS, TABLE)
    factor = factor_of_scores(temperature, i_head, scale)
    if OF_KEYS <= BLOCK_K:
        b_k, b_s, b_dp = _keys_of_queries(
            k, v, bias, temperature, b_q, b_g, o_query, 0, i_group, i_head, key_height, key_width, down, across,
            factor, HEADS, D, QUERIES, KEYS, TABLE, OVERLAPPING, PIXELS, FIRSTS, PRECISION, BLOCK_K, BLOCK_D,
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
        for i_k in range(0, OF_KEYS, BLOCK_K):
            b_k, b_s, b_dp = _keys_of_queries(
                k, v, bias, temperature, b_q, b_g, o_query, i_k, i_group, i_head, key_height, key_width, down, across,
                factor, HEADS, D, QUERIES, KEYS, TABLE, OVERLAPPING, PIXELS, FIRSTS, PRECISION, BLOCK_K, BLOCK_D,
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
        for i_k in range(0, OF_KEYS, BLOCK_K):
            b_k, b_s, b_dp = _keys_of_queries(
                k, v, bias, temperature, b_q, b_g, o_query, i_k, i_group, i_head, key_height, key_width, down, across,
                factor, HEADS, D, QUERIES, KEYS, TABLE, OVERLAPPING, PIXELS, FIRSTS, PRECISION, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            b_p = tl.exp2(b_s - b_shift[:, None]) * b_inverse[:, None]
            b_ds, b_factor = as_operand(b_p * (b_dp - b_mean[:, None]), b_q.dtype)
            b_dq += dot(b_ds, b_k, None, PRECISION) * b_factor
    p_statistics = statistics + (i_group * HEADS + i_head).to(tl.int64) * (3 * TOKENS) + o_q
    tl.store(p_statistics, b_shift, mask=o_q < TOKENS)
    tl.store(p_statistics + TOKENS, b_inverse, mask=o_q < TOKENS)
    tl.store(p_statistics + 2 * TOKENS, b_mean, mask=o_q < TOKENS)
    b_dq, b_share = gradient_of_rows(b_dq, b_raw, temperature, factor)
    if temperature is not None:
        tl.store(grad_factors + tl.program_id(0), tl.sum(b_share, axis=0))
    p_q = FIRSTS[0] + o_row[:, None] * GRADS[0] + o_c[None, :]
    tl.store(grad_q + p_q, b_dq.to(grad_q.dtype.element_ty), mask=m_rows)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_keys_kernel(
    grad, q, k, v, bias, temperature, statistics, grad_k, grad_v, sums,
    groups, height, width, key_height, key_width, down, across, scale,
    HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr,
    OVERLAPPING: tl.constexpr, PIXELS: tl.constexpr, FIRSTS: tl.constexpr, GRADS: tl.constexpr,
    PRECISION: tl.constexpr, SHARES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_k, b_v, b_dk, b_dv: (BLOCK_K, BLOCK_D); b_q, b_g: (BLOCK_Q, BLOCK_D); b_s, b_p, b_ds: (BLOCK_K, BLOCK_Q)
    TOKENS: tl.constexpr = QUERIES[0] * QUERIES[1]
    OF_KEYS: tl.constexpr = KEYS[0] * KEYS[1]
    BLOCKS: tl.constexpr = (OF_KEYS + BLOCK_K - 1) // BLOCK_K
    C: tl.constexpr = HEADS * D
    i_block = tl.program_id(0) % BLOCKS
    i_head = tl.program_id(0) // BLOCKS % HEADS
    i_share = tl.program_id(0) // (BLOCKS * HEADS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = i_head * D + o_d
    o_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    o_key = key_rows(o_k, KEYS, TABLE)
    factor = factor_of_scores(temperature, i_head, scale)
    p_sums = sums
    if bias is not None:
        p_sums += (i_share * HEADS + i_head).to(tl.int64) * (TOKENS * OF_KEYS)
    b_sums = tl.zeros((BLOCK_K, BLOCK_Q), dtype=tl.float32)
    if TOKENS <= BLOCK_Q:
        o_query = query_rows(tl.arange(0, BLOCK_Q), QUERIES, KEYS, TABLE)
        b_bias = biases(bias, o_query[None, :] - o_key[:, None], i_head, HEADS, QUERIES, KEYS, TABLE)
    for i_group in range(i_share, groups, SHARES):
        o_pixel, m_k = group_pixels(i_group, o_k, key_height, key_width, down, across, KEYS)
        m_keys = are_keys(o_k, m_k, KEYS, OVERLAPPING)
        m_x = m_k[:, None] & m_d[None, :]
        p_k, p_v = places_of_keys(k, v, o_pixel, o_c, PIXELS, FIRSTS)
        b_raw = tl.load(p_k, mask=m_x, other=0.0)
        b_k = rows_of_scores(b_raw, temperature)
        b_v = tl.load(p_v, mask=m_x, other=0.0)
        b_dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        b_dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        p_statistics = statistics + (tl.zeros((1,), dtype=tl.int64) + i_group * HEADS + i_head) * (3 * TOKENS)
        for i_q in range(0, TOKENS, BLOCK_Q):
            o_q = i_q + tl.arange(0, BLOCK_Q)
            o_row, m_q = group_pixels(i_group, o_q, height, width, down, across, QUERIES)
            m_rows = m_q[:, None] & m_d[None, :]
            b_q = tl.load(q + FIRSTS[0] + o_row[:, None] * PIXELS[0] + o_c[None, :], mask=m_rows, other=0.0)
            b_q = rows_of_scores(b_q, temperature)
            b_g = tl.load(grad + o_row[:, None] * C + o_c[None, :], mask=m_rows, other=0.0)
            b_shift = tl.load(p_statistics + o_q, mask=m_q, other=0.0)
            b_inverse = tl.load(p_statistics + TOKENS + o_q, mask=m_q, other=0.0)
            b_mean = tl.load(p_statistics + 2 * TOKENS + o_q, mask=m_q, other=0.0)
            if TOKENS > BLOCK_Q:
                o_query = query_rows(o_q, QUERIES, KEYS, TABLE)
                b_bias = biases(bias, o_query[None, :] - o_key[:, None], i_head, HEADS, QUERIES, KEYS, TABLE)
            b_s = masked_scores(b_k, b_q, b_bias, m_keys[:, None] & m_q[None, :], factor, PRECISION)
            b_p = tl.exp2(b_s - b_shift[None, :]) * b_inverse[None, :]
            b_dv = dot(b_p.to(b_g.dtype), b_g, b_dv, PRECISION)
            b_dp = dot(b_v, tl.trans(b_g), None, PRECISION)
            b_ds = b_p * (b_dp - b_mean[None, :])
            if bias is not None:
                if TOKENS <= BLOCK_Q:
                    b_sums += b_ds
                else:
                    o_sums = o_k[:, None] * TOKENS + o_q[None, :]
                    m_sums = (o_k < OF_KEYS)[:, None] & (o_q < TOKENS)[None, :]
                    b_before = tl.load(p_sums + o_sums, mask=m_sums, other=0.0)
                    tl.store(p_sums + o_sums, b_before + b_ds, mask=m_sums)
            b_ds, b_factor = as_operand(b_ds, b_q.dtype)
            b_dk += dot(b_ds, b_q, None, PRECISION) * b_factor
        b_dk, _ = gradient_of_rows(b_dk, b_raw, temperature, factor)
        store_keys(grad_k, b_dk, FIRSTS[1], GRADS[1], o_pixel, i_group, o_k, o_c, m_x, m_d, C, KEYS, OVERLAPPING)
        store_keys(grad_v, b_dv, FIRSTS[2], GRADS[2], o_pixel, i_group, o_k, o_c, m_x, m_d, C, KEYS, OVERLAPPING)
        if bias is not None and TOKENS > BLOCK_Q:
            tl.debug_barrier()  # the next group adds to what other threads may have stored
    if bias is not None and TOKENS <= BLOCK_Q:
        o_q = tl.arange(0, BLOCK_Q)
        m_sums = (o_k < OF_KEYS)[:, None] & (o_q < TOKENS)[None, :]
        tl.store(p_sums + o_k[:, None] * TOKENS + o_q[None, :], b_sums, mask=m_sums)


def _one_block(x, lattice, temperature):
    """Configurations where all tokens are one block."""
    if is_wide(x, lattice):  # with a limit, as in the forward; a lower one spills
        limits = dict(num_warps=8, maxnreg=255), dict(num_warps=16)
    else:
        limits = [dict(num_warps=warps) for warps in ((4, 8) if temperature is None else (8, 4))]
    blocks = dict(BLOCK_Q=block_of(lattice.tokens), BLOCK_K=block_of(lattice.key_tokens))
    return [dict(**blocks, num_stages=1, **limit) for limit in limits]


def _query_tiles(x, lattice):
    block = block_of(lattice.key_tokens)
    if is_wide(x, lattice):
        shapes = [(64, 32, 8, 1) if lattice.depth > 32 else (32, 32, 4, 1), (16, 64, 4, 1), (32, 32, 8, 1)]
    else:
        shapes = [(64, 64, 4, 1), (32, 256, 8, 1), (64, 128, 8, 1), (128, 64, 8, 1), (32, 64, 4, 1)]
    return [
        dict(BLOCK_Q=q, BLOCK_K=min(k, block), num_warps=warps, num_stages=stages) for q, k, warps, stages in shapes
    ]


def _key_tiles(x, lattice, bias):
    block = block_of(lattice.tokens)
    if is_wide(x, lattice):
        shapes = [(16, 32, 8, 1), (16, 32, 4, 1), (32, 32, 8, 1)]
    elif bias is None:
        shapes = [(32, 64, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1), (64, 128, 8, 1)]
    else:
        shapes = [(256, 32, 8, 1), (256, 16, 8, 1), (256, 32, 16, 1)]
    if lattice.queries[2] > 0 and shapes[0] == (256, 32, 8, 1):  # windows take more registers to find pixels
        shapes[:2] = reversed(shapes[:2])
    return [
        dict(BLOCK_Q=min(q, block), BLOCK_K=k, num_warps=warps, num_stages=stages) for q, k, warps, stages in shapes
    ]


def attention_backward(lattice, grad, q, k, v, bias, temperature, scale, grads):
    """Writes the gradients of `Channels` q, k, v to the tensors ``grads``, which have their channels.

    Where windows of keys overlap, those of k and v are of each window, (groups, keys, channels) in fp32. Returns the
    gradients of bias and temperature, None without them.
    """
    x, heads = q.of, lattice.heads
    key, constants = lattice.key(x, bias, temperature), lattice.constants(x) | places_of(q, k, v)
    constants["GRADS"] = tuple(each.stride(3) if each.dim() == 4 else 0 for each in grads)
    product, element = 2 * lattice.scores * block_of(lattice.depth), x.element_size()
    of_keys = 2 * lattice.groups * lattice.key_tokens * lattice.channels  # values of keys and values
    grad_factors, grad_q, *grads_k = None, *grads
    if lattice.most <= 64:
        shares = max(1, PROGRAMS // heads)
        tiles = config(f"{lattice.operator}_bwd", key, _one_block(x, lattice, temperature), x.device)
        sums = sums_of_scores(lattice, shares, bias, tiles["BLOCK_Q"])
        if temperature is not None:
            grad_factors = torch.empty(min(shares, lattice.groups), heads, dtype=torch.float32, device=x.device)
        launch(
            attention_bwd_kernel, (min(shares, lattice.groups) * heads,),
            grad, *maps_of(q, k, v), bias, temperature, *grads, sums, grad_factors,
            lattice.groups, *lattice.steps, scale, SHARES=shares, **constants, **tiles,
            work=Work(
                (3 * grad.numel() + 2 * of_keys) * element + (0 if sums is None else 4 * sums.numel()),
                matrix=5 * product, vector=16 * lattice.scores,
            ),
        )  # fmt: skip
    else:
        statistics = torch.empty(lattice.groups, heads, 3, lattice.tokens, dtype=torch.float32, device=x.device)
        tiles = config(f"{lattice.operator}_bwd_queries", key, _query_tiles(x, lattice), x.device)
        passes = 3 if tiles["BLOCK_K"] >= lattice.key_tokens else 5
        blocks = cdiv(lattice.tokens, tiles["BLOCK_Q"])
        if temperature is not None:
            grad_factors = torch.empty(lattice.groups, heads, blocks, dtype=torch.float32, device=x.device)
        launch(
            attention_bwd_queries_kernel, (lattice.groups * heads * blocks,),
            grad, *maps_of(q, k, v), bias, temperature, grad_q, statistics, grad_factors, *lattice.steps, scale,
            **constants, **tiles,
            work=Work(
                (3 * grad.numel() + of_keys) * element + 4 * statistics.numel(),
                matrix=passes * product, vector=passes // 2 * 10 * lattice.scores,
            ),
        )  # fmt: skip
        shares = max(1, PROGRAMS_OF_BLOCKS // heads)
        tiles = config(f"{lattice.operator}_bwd_keys", key, _key_tiles(x, lattice, bias), x.device)
        if tiles["BLOCK_Q"] * tiles["BLOCK_K"] < 32 * tiles["num_warps"]:  # then several threads would hold a value
            raise ValueError(f"attention_bwd_keys adds to its sums: a tile needs a value a thread; got {tiles}")
        sums = sums_of_scores(lattice, shares, bias, tiles["BLOCK_Q"])
        launch(
            attention_bwd_keys_kernel,
            (min(shares, lattice.groups) * heads * cdiv(lattice.key_tokens, tiles["BLOCK_K"]),),
            grad, *maps_of(q, k, v), bias, temperature, statistics, *grads_k, sums,
            lattice.groups, *lattice.steps, scale, SHARES=shares, **constants, **tiles,
            work=Work(
                (2 * grad.numel() + 2 * of_keys) * element + 4 * statistics.numel()
                + (0 if sums is None else 4 * sums.numel()),
                matrix=4 * product, vector=10 * lattice.scores,
            ),
        )  # fmt: skip
    grad_bias = None if bias is None else bias_gradient(sums, lattice, bias)
    if temperature is None:
        return grad_bias, None
    return grad_bias, grad_factors.transpose(0, 1).flatten(1).sum(dim=1).to(temperature.dtype)
