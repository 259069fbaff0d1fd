"""Merging the linear branches of Rep-LeFFN: see ipt_fast.ops.merge.

merge_pointwise, and both products of its backward, are one strided product of matrices: a program makes a tile of the
result, with sums in fp32 in the order of the inner index, rounded once. merge_depthwise takes all branches in one
launch, a value of the 5 x 5 kernel each, and so does its backward. All of it is small beside the convolution itself.
"""

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._launch import Work, cdiv, config, key_of, launch, precision


@triton.jit
def merge_pointwise_kernel(
    a, b, y, M, N, K, a_row, a_column, b_row, b_column,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # y: (M, N) = a: (M, K) @ b: (K, N); a and b with any strides
    i_across = tl.cdiv(N, BLOCK_N)
    o_m = tl.program_id(0) // i_across * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % i_across * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    b_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        p_a = a + o_m[:, None] * a_row + o_k[None, :] * a_column
        p_b = b + o_k[:, None] * b_row + o_n[None, :] * b_column
        b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_y = dot(b_a, b_b, b_y, PRECISION)
    tl.store(y + o_m[:, None] * N + o_n[None, :], b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def merge_depthwise_fwd_kernel(k5, k3, k1, y, values, IDENTITY: tl.constexpr, BLOCK: tl.constexpr):
    # values: 25 a channel
    o_v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_c, i_t = o_v // 25, o_v % 25
    i_y, i_x = i_t // 5, i_t % 5
    m_v = o_v < values
    m_3 = m_v & (i_y >= 1) & (i_y <= 3) & (i_x >= 1) & (i_x <= 3)
    m_1 = m_v & (i_t == 12)
    b_1 = tl.load(k1 + i_c, mask=m_1, other=0.0).to(tl.float32)
    if IDENTITY:
        b_1 += tl.where(m_1, 1.0, 0.0)
    b_y = tl.load(k5 + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_y += tl.load(k3 + i_c * 9 + (i_y - 1) * 3 + (i_x - 1), mask=m_3, other=0.0).to(tl.float32)
    tl.store(y + o_v, (b_y + b_1).to(y.dtype.element_ty), mask=m_v)


@triton.jit
def merge_depthwise_bwd_kernel(grad, k5, k3, k1, values, BLOCK: tl.constexpr):
    # k5, k3, k1: the gradients to write
    o_v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_c, i_t = o_v // 25, o_v % 25
    i_y, i_x = i_t // 5, i_t % 5
    m_v = o_v < values
    b_g = tl.load(grad + o_v, mask=m_v, other=0.0)
    tl.store(k5 + o_v, b_g, mask=m_v)
    m_3 = m_v & (i_y >= 1) & (i_y <= 3) & (i_x >= 1) & (i_x <= 3)
    tl.store(k3 + i_c * 9 + (i_y - 1) * 3 + (i_x - 1), b_g, mask=m_3)
    tl.store(k1 + i_c, b_g, mask=m_v & (i_t == 12))


def _product(a, b):
    """a @ b of matrices with any strides, as a (M, N, 1, 1) weight."""
    (rows, inner), columns = a.shape, b.shape[1]
    y = a.new_empty(rows, columns, 1, 1)
    candidates = [
        dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=w, num_stages=s)
        for m, n, k, w, s in ((32, 32, 32, 4, 2), (64, 32, 32, 4, 2), (32, 32, 64, 4, 3), (64, 64, 32, 4, 3))
    ]
    tiles = config("merge_pointwise", key_of(a), candidates, a.device)
    launch(
        merge_pointwise_kernel, (cdiv(rows, tiles["BLOCK_M"]) * cdiv(columns, tiles["BLOCK_N"]),),
        a, b, y, rows, columns, inner, *a.stride(), *b.stride(), PRECISION=precision(a), **tiles,
        work=Work((a.numel() + b.numel() + y.numel()) * a.element_size(), matrix=2 * inner * y.numel()),
    )  # fmt: skip
    return y


def merge_pointwise(first, second):
    return _product(second.flatten(1), first.flatten(1))


def merge_pointwise_backward(grad, first, second):
    grad = grad.flatten(1)
    return _product(second.flatten(1).t(), grad), _product(grad, first.flatten(1).t())


def merge_depthwise(k5, k3, k1, identity):
    y = torch.empty_like(k5)
    launch(
        merge_depthwise_fwd_kernel, (cdiv(y.numel(), 512),),
        k5, k3, k1, y, y.numel(), IDENTITY=identity, BLOCK=512, num_warps=4,
        work=Work((2 * y.numel() + k3.numel() + k1.numel()) * y.element_size()),
    )  # fmt: skip
    return y


def merge_depthwise_backward(grad, k5, k3, k1, identity):
    grads = torch.empty_like(k5), torch.empty_like(k3), torch.empty_like(k1)
    launch(
        merge_depthwise_bwd_kernel, (cdiv(grad.numel(), 512),),
        grad, *grads, grad.numel(), BLOCK=512, num_warps=4,
        work=Work((2 * grad.numel() + k3.numel() + k1.numel()) * grad.element_size()),
    )  # fmt: skip
    return grads
