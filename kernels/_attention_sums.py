"""The last sums of attention's backward: of scores' gradients into biases', of overlapping windows' into pixels'."""

import torch
import triton
import triton.language as tl

from ._launch import Work, block_of, cdiv, launch


@triton.jit
def bias_table_bwd_kernel(
    sums, grad_table,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TABLE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # One program an entry: adds up sums (HEADS, keys, queries) over the queries that have a key at its distance.
    TOKENS: tl.constexpr = QUERIES[0] * QUERIES[1]
    OF_KEYS: tl.constexpr = KEYS[0] * KEYS[1]
    i_entry = tl.program_id(0) // HEADS
    i_head = tl.program_id(0) % HEADS
    b_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for i_q in range(0, TOKENS, BLOCK_T):
        o_q = i_q + tl.arange(0, BLOCK_T)
        o_a = o_q // QUERIES[1] - i_entry // TABLE[0] + TABLE[1] // TABLE[0]
        o_b = o_q % QUERIES[1] - i_entry % TABLE[0] + TABLE[1] % TABLE[0]
        m_q = (o_q < TOKENS) & (o_a >= 0) & (o_a < KEYS[0]) & (o_b >= 0) & (o_b < KEYS[1])
        p_sums = sums + i_head * (TOKENS * OF_KEYS) + (o_a * KEYS[1] + o_b).to(tl.int64) * TOKENS + o_q
        b_sum += tl.load(p_sums, mask=m_q, other=0.0)
    tl.store(grad_table + tl.program_id(0), tl.sum(b_sum, axis=0).to(grad_table.dtype.element_ty))


def sums_of_scores(lattice, shares, bias, block):
    """Where programs leave the gradients of scores, or None; zeros where they add to it, block by block of queries."""
    if bias is None:
        return None
    shape = (min(shares, lattice.groups), lattice.heads, lattice.key_tokens, lattice.tokens)
    make = torch.empty if block >= lattice.tokens else torch.zeros
    return make(shape, dtype=torch.float32, device=bias.device)


def bias_gradient(sums, lattice, bias):
    """Of a table or of dense biases, from gradients of scores (programs, heads, keys, queries)."""
    sums = sums.sum(dim=0)
    if bias.dim() == 3:
        return sums.transpose(1, 2).to(bias.dtype).contiguous()
    gradient = torch.empty_like(bias)
    block = min(block_of(lattice.tokens), 1024)
    launch(
        bias_table_bwd_kernel, (bias.numel(),), sums, gradient,
        HEADS=lattice.heads, QUERIES=lattice.queries, KEYS=lattice.keys, TABLE=lattice.table, BLOCK_T=block,
        num_warps=max(1, block // 256), work=Work(4 * (sums.numel() + bias.numel()), vector=sums.numel()),
    )  # fmt: skip
    return gradient


@triton.jit(do_not_specialize=["pixels", "height", "width", "down", "across"])
def overlapping_bwd_kernel(
    parts, grad, pixels, height, width, down, across,
    C: tl.constexpr, KEYS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # grad, a map: of parts (groups, keys, C) the sum over the windows that a pixel is in; b_sum: (BLOCK_P, BLOCK_C)
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_p = tl.program_id(0) // BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    o_y, o_x = o_p // width % height - KEYS[4], o_p % width - KEYS[5]
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for i_y in range((KEYS[0] + KEYS[2] - 1) // KEYS[2]):
        for i_x in range((KEYS[1] + KEYS[3] - 1) // KEYS[3]):
            o_wy, o_wx = o_y // KEYS[2] - i_y, o_x // KEYS[3] - i_x
            o_ky, o_kx = o_y - o_wy * KEYS[2], o_x - o_wx * KEYS[3]
            m_p = (o_wy >= 0) & (o_wy < down) & (o_ky < KEYS[0]) & (o_wx >= 0) & (o_wx < across) & (o_kx < KEYS[1])
            o_group = (o_p // width // height * down + o_wy) * across + o_wx
            p_part = parts + (o_group * (KEYS[0] * KEYS[1]) + o_ky * KEYS[1] + o_kx)[:, None] * C + o_c[None, :]
            b_sum += tl.load(p_part, mask=(m_p & (o_p < pixels))[:, None] & (o_c < C)[None, :], other=0.0)
    p_grad = grad + o_p[:, None] * C + o_c[None, :]
    tl.store(p_grad, b_sum.to(grad.dtype.element_ty), mask=(o_p < pixels)[:, None] & (o_c < C)[None, :])


def sum_of_windows(lattice, parts, grad):
    """Writes to the map ``grad`` the sum of what overlapping windows have of it, (groups, keys, channels)."""
    batch, channels, height, width = grad.shape
    pixels, (*_, down, across) = batch * height * width, lattice.steps
    tiles = dict(BLOCK_P=32, BLOCK_C=min(64, block_of(channels)))
    launch(
        overlapping_bwd_kernel, (cdiv(pixels, tiles["BLOCK_P"]) * cdiv(channels, tiles["BLOCK_C"]),),
        parts, grad, pixels, height, width, down, across, C=channels, KEYS=lattice.keys, **tiles, num_warps=4,
        work=Work(4 * parts.numel() + grad.numel() * grad.element_size(), vector=parts.numel()),
    )  # fmt: skip
