"""Pointwise convolution of a map: norm(x) W^T, with layer norm before it, a bias, GELU, a gate or a residual after it.

A map is a matrix of pixels by channels. A program takes BLOCK_P pixels and makes LOOP blocks of outputs. Where all
channels fit one block, pixels are read and normalised once, in registers. Else mean and variance are read from the map
first, which comes from the cache, and every program normalises anew what it multiplies, or the norm is a kernel of its
own. Memory traffic: C values in, N out, N more for a residual.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ._dot import dot, widened
from ._gelu import gelu
from ._images import alike, images_and_pixels, is_each_image, of_image
from ._launch import Work, block_of, cdiv, config, key_of, launch, matmul, precision
from .layer_norm_2d import layer_norm_2d


@triton.jit
def row_statistics(x, o_p, m_p, eps, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    # mean and 1 / standard deviation of rows: (BLOCK_P,); the variance from centred values, so in a second pass
    b_sum = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for i_k in range(0, C, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_x = m_p[:, None] & (o_k < C)[None, :]
        b_sum += tl.sum(tl.load(x + o_p[:, None] * C + o_k[None, :], mask=m_x, other=0.0).to(tl.float32), axis=1)
    b_mean = b_sum / C
    b_sum = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for i_k in range(0, C, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_x = m_p[:, None] & (o_k < C)[None, :]
        b_x = tl.load(x + o_p[:, None] * C + o_k[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_s = tl.where(m_x, b_x - b_mean[:, None], 0.0)
        b_sum += tl.sum(b_s * b_s, axis=1)
    return b_mean, 1.0 / tl.sqrt(b_sum / C + eps)


@triton.jit
def affine(b_n, norm_weight, norm_bias, o_k, m_k):
    b_n *= tl.load(norm_weight + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if norm_bias is not None:
        b_n += tl.load(norm_bias + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    return b_n


@triton.jit
def normalised_part(x, norm_weight, norm_bias, b_mean, b_rstd, o_p, m_p, o_k, C: tl.constexpr, CENTERED: tl.constexpr):
    # (BLOCK_P, BLOCK_K) of norm(x), or of x where there is no norm; zero beyond the channels
    m_k = o_k < C
    b_x = tl.load(x + o_p[:, None] * C + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0)
    if norm_weight is not None:
        b_n = b_x.to(tl.float32)
        if CENTERED:
            b_n -= b_mean[:, None]
        b_x = affine(b_n * b_rstd[:, None], norm_weight, norm_bias, o_k, m_k).to(x.dtype.element_ty)
    return b_x


@triton.jit
def normalised_rows(x, norm_weight, norm_bias, eps, o_p, m_p, C: tl.constexpr, CENTERED: tl.constexpr,
                    BLOCK_K: tl.constexpr):  # fmt: skip
    # the same of whole rows, which are read once
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < C
    b_x = tl.load(x + o_p[:, None] * C + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0)
    if norm_weight is not None:
        b_n = widened(b_x)
        b_s = tl.where(m_k[None, :], b_n - (tl.sum(b_n, axis=1) / C)[:, None], 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_s * b_s, axis=1) / C + eps)
        if CENTERED:
            b_n = b_s
        b_x = affine(b_n * b_rstd[:, None], norm_weight, norm_bias, o_k, m_k).to(x.dtype.element_ty)
    return b_x


@triton.jit
def plus_bias(b_y, bias, o_n, m_n):
    # b_y + bias, which may be None, of outputs o_n
    if bias is not None:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return b_y


@triton.jit
def gated_residual(b_y, gate, residual, p_y, o_n, m_n, m_y):
    # residual + gate * b_y, each of which may be None
    if gate is not None:
        b_y *= tl.load(gate + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        b_y += tl.load(residual + p_y, mask=m_y, other=0.0).to(tl.float32)
    return b_y


@triton.jit(do_not_specialize=["pixels"])
def pointwise_fwd_kernel(
    x, weight, norm_weight, norm_bias, bias, gate, residual, y, pixels, eps,
    C: tl.constexpr, N: tl.constexpr, CENTERED: tl.constexpr, EACH_IMAGE: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    # b_a: (BLOCK_P, BLOCK_K), b_w: (BLOCK_K, BLOCK_N), b_y: (BLOCK_P, BLOCK_N); pixels: of an image, if EACH_IMAGE
    GROUPS: tl.constexpr = (N + LOOP * BLOCK_N - 1) // (LOOP * BLOCK_N)
    i_group = tl.program_id(0) % GROUPS
    i_block = tl.program_id(0) // GROUPS
    if EACH_IMAGE:
        i_image = i_block // tl.cdiv(pixels, BLOCK_P)
        i_block %= tl.cdiv(pixels, BLOCK_P)
        x, y = of_image(x, i_image, pixels, C), of_image(y, i_image, pixels, N)
        if norm_weight is not None:
            norm_weight = of_image(norm_weight, i_image, 1, C)
        if norm_bias is not None:
            norm_bias = of_image(norm_bias, i_image, 1, C)
        if gate is not None:
            gate = of_image(gate, i_image, 1, N)
        if residual is not None:
            residual = of_image(residual, i_image, pixels, N)
    o_p = i_block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < pixels
    b_mean, b_rstd = 0.0, 0.0
    if BLOCK_K >= C:
        b_a = normalised_rows(x, norm_weight, norm_bias, eps, o_p, m_p, C, CENTERED, BLOCK_K)
    elif norm_weight is not None:
        b_mean, b_rstd = row_statistics(x, o_p, m_p, eps, C, BLOCK_P, BLOCK_K)
    for i_loop in range(LOOP):
        o_n = (i_group * LOOP + i_loop) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_y = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
        for i_k in range(0, C, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            p_w = weight + o_n[None, :] * C + o_k[:, None]
            b_w = tl.load(p_w, mask=m_n[None, :] & (o_k < C)[:, None], other=0.0)
            if BLOCK_K < C:
                b_a = normalised_part(x, norm_weight, norm_bias, b_mean, b_rstd, o_p, m_p, o_k, C, CENTERED)
            b_y = dot(b_a, b_w, b_y, PRECISION)
        b_y = plus_bias(b_y, bias, o_n, m_n)
        if GELU:
            b_y = gelu(b_y, y.dtype.element_ty)
        p_y = o_p[:, None] * N + o_n[None, :]
        m_y = m_p[:, None] & m_n[None, :]
        b_y = gated_residual(b_y, gate, residual, p_y, o_n, m_n, m_y)
        tl.store(y + p_y, b_y.to(y.dtype.element_ty), mask=m_y)


def side_of(width, sides=(128, 64, 32)):
    """The largest of the block sides that cover ``width`` with at most an eighth more than the best of them."""
    least = min(cdiv(width, side) * side for side in sides)
    return next(side for side in sides if cdiv(width, side) * side * 8 <= least * 9)


APART = dict(FUSED=False)  # the norm in a kernel of its own


@functools.cache
def _tiles(size, channels, outputs, norm):
    whole = size == 2 and channels <= 128
    if whole:
        shapes = [(128, 64, 8, 2), (64, 128, 4, 2), (128, 64, 4, 2), (64, 64, 4, 1), (128, 128, 8, 2), (64, 64, 4, 3)]
        found = []
        for p, most, warps, stages in shapes:
            n = side_of(outputs, [side for side in (128, 64, 32) if side <= most])
            loop = cdiv(outputs, n)
            tiles = dict(BLOCK_P=p, BLOCK_K=block_of(channels), BLOCK_N=n, LOOP=loop, num_warps=warps)
            found.append(tiles | dict(num_stages=stages))
    else:
        if size == 4:  # where a limit keeps the compiler from spilling a few values to fit one more block
            shapes = [
                (64, 16, 64, 4, 2, 128),
                (128, 16, 64, 4, 2, 168),
                (128, 32, 64, 8, 2, 168),
                (32, 32, 32, 4, 2, 80),
            ]
        else:
            shapes = [(64, 64, 128, 4, 3), (128, 64, 128, 8, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4)]
            shapes += [(128, 64, 64, 4, 3), (64, 128, 128, 4, 2)]
        found = [
            dict(BLOCK_P=p, BLOCK_K=min(k, block_of(channels)), BLOCK_N=n, LOOP=1, num_warps=w, num_stages=s)
            | ({"maxnreg": limit[0]} if limit else {})
            for p, k, n, w, s, *limit in shapes
        ]
    found = [tiles for i, tiles in enumerate(found) if tiles not in found[:i]]
    return found if whole or not norm else [APART, *found]


def empty_map(x, channels):
    """An unwritten map or matrix with the pixels of ``x`` and other channels."""
    if x.dim() == 2:
        return x.new_empty(x.shape[0], channels)
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def pixels_of(x):
    """A channels-last map as the matrix of its pixels, a view; a matrix as it is."""
    return x if x.dim() == 2 else x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def map_of(matrix, x):
    """The inverse: a matrix with the pixels of the map ``x`` as a channels-last map."""
    if x.dim() == 2:
        return matrix
    batch, _, height, width = x.shape
    return matrix.view(batch, height, width, matrix.shape[1]).permute(0, 3, 1, 2)


def pointwise(
    x, weight, norm_weight=None, norm_bias=None, eps=0.0, centered=True, gelu=False, residual=None, bias=None, gate=None
):
    """residual + gate * gelu(norm(x) W^T + bias) of a channels-last map (B, C, H, W) or a matrix (pixels, C).

    Args:
        x: the map or matrix; the result and ``residual`` have its form.
        weight: (N, C, 1, 1).
        norm_weight, norm_bias: (C,) or, for a map, (B, C) of each image; None for no norm, or no bias of it.
        bias: (N,) or None.
        gate: (N,) or, for a map, (B, N) of each image; None for 1.

    A bare product is PyTorch's.
    """
    outputs, channels = weight.shape[:2]
    if not gelu and all(each is None for each in (norm_weight, bias, gate, residual)):
        return map_of(matmul(pixels_of(x), weight.view(outputs, channels).t()), x)
    norm = norm_weight is not None
    key = key_of(x, channels, outputs, *(["norm"] if norm else []), *(["gelu"] if gelu else []))
    tiles = config("pointwise_fwd", key, _tiles(x.element_size(), channels, outputs, norm), x.device)
    if tiles == APART:
        normal = layer_norm_2d(x, norm_weight, norm_bias, eps, centered)
        return pointwise(normal, weight, gelu=gelu, residual=residual, bias=bias, gate=gate)
    each_image = is_each_image(norm_weight, norm_bias, gate)
    norm_weight, norm_bias, gate = alike(x.shape[0], norm_weight, norm_bias, gate)
    images, pixels = images_and_pixels(x, channels, each_image)
    y = empty_map(x, outputs)
    groups = cdiv(outputs, tiles["BLOCK_N"] * tiles["LOOP"])
    values = x.numel() + weight.numel() + y.numel() + (0 if residual is None else y.numel())
    launch(
        pointwise_fwd_kernel, (images * cdiv(pixels, tiles["BLOCK_P"]) * groups,),
        x, weight, norm_weight, norm_bias, bias, gate, residual, y, pixels, eps,
        C=channels, N=outputs, CENTERED=centered, EACH_IMAGE=each_image, GELU=gelu, PRECISION=precision(x), **tiles,
        work=Work(
            values * x.element_size(), matrix=2 * math.prod((images, pixels, channels, outputs)),
            vector=(8 * x.numel() if norm else 0) + (16 * y.numel() if gelu else 0),
        ),
    )  # fmt: skip
    return y
