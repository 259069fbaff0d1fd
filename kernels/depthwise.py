"""Depthwise convolution of channels-last maps, K x K with zero padding, and its gradients.

Forward, and the gradient of the input, which is the same with flipped taps: a program takes 4 rows of BLOCK_W pixels
and BLOCK_C channels. It reads a shifted row once for all the rows it makes from it: (3 + K) K reads of the cache for
4 K^2 products. Memory traffic: C values in, C out a pixel.

Gradient of the weight: a program walks down strips of BLOCK_W columns with its K^2 sums in registers and the last K
rows of the gradient beside them, so every row is read K times and every gradient once, from the cache; 2 C values a
pixel from memory. How many strips are added up together depends on the channels alone; PyTorch adds up those sums.
"""

import functools

import torch
import triton
import triton.language as tl

from ._dot import widened
from ._launch import Work, cdiv, config, key_of, launch
from .pointwise import side_of

ROWS = 4  # of output in a tile
STRIP = 32  # rows of a strip of the weight's gradient


@triton.jit
def tile_position(i_tile, height, width, BLOCK_W: tl.constexpr):
    # image, first row and first column of a tile of 4 rows, counted along rows first
    i_across = tl.cdiv(width, BLOCK_W)
    i_down = tl.cdiv(height, 4)
    i_row = i_tile // i_across
    return i_row // i_down, i_row % i_down * 4, i_tile % i_across * BLOCK_W


@triton.jit
def tile_pixels(i_image, i_y, i_x, height, width, BLOCK_W: tl.constexpr):
    # index of a tile's pixels in the map, row after row, and which of them are there: (4 * BLOCK_W,)
    o_t = tl.arange(0, 4 * BLOCK_W)
    o_y, o_x = i_y + o_t // BLOCK_W, i_x + o_t % BLOCK_W
    return (i_image * height + o_y).to(tl.int64) * width + o_x, (o_y < height) & (o_x < width)


@triton.jit
def columns_of(i_row, height, width):
    # how many columns a row has: none outside of the image
    return tl.where((i_row >= 0) & (i_row < height), width, 0)


@triton.jit
def convolve_rows(
    x, taps, i_image, i_y, o_x, o_c, height, width, C: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    FLIP: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # four rows of output from i_y on, each (BLOCK_W, BLOCK_C) in fp32; taps: (K * K, C) in fp32, a row more with BIAS
    m_c = o_c < C
    b_0 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    b_1 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    b_2 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    b_3 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    if BIAS:
        b_bias = tl.load(taps + K * K * C + o_c, mask=m_c, other=0.0)[None, :]
        b_0, b_1, b_2, b_3 = b_0 + b_bias, b_1 + b_bias, b_2 + b_bias, b_3 + b_bias
    for i_k in range(K):
        o_s = o_x + (i_k - K // 2)
        p_s = o_s[:, None] * C + o_c[None, :]
        for i in tl.static_range(K + 3):
            i_in = i_y + (i - K // 2)
            p_x = x + (i_image * height + i_in).to(tl.int64) * width * C
            m_s = ((o_s >= 0) & (o_s < columns_of(i_in, height, width)))[:, None] & m_c[None, :]
            b_x = widened(tl.load(p_x + p_s, mask=m_s, other=0.0))
            for i_row in tl.static_range(4):
                if i >= i_row and i - i_row < K:
                    i_tap = (i - i_row) * K + i_k
                    if FLIP:
                        i_tap = K * K - 1 - i_tap
                    b_t = tl.load(taps + i_tap * C + o_c, mask=m_c, other=0.0)[None, :]
                    if i_row == 0:
                        b_0 = tl.fma(b_x, b_t, b_0)
                    elif i_row == 1:
                        b_1 = tl.fma(b_x, b_t, b_1)
                    elif i_row == 2:
                        b_2 = tl.fma(b_x, b_t, b_2)
                    else:
                        b_3 = tl.fma(b_x, b_t, b_3)
    return b_0, b_1, b_2, b_3


@triton.jit
def stack_rows(b_0, b_1, b_2, b_3, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    # (4 * BLOCK_W, BLOCK_C)
    b_all = tl.join(tl.join(b_0, b_1), tl.join(b_2, b_3))
    return tl.reshape(tl.permute(b_all, (3, 2, 0, 1)), (4 * BLOCK_W, BLOCK_C))


@triton.jit(do_not_specialize=["height", "width", "strips"])
def depthwise_fwd_kernel(
    x, taps, y, height, width,
    C: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_image, i_y, i_x = tile_position(tl.program_id(0) // BLOCKS, height, width, BLOCK_W)
    o_x = i_x + tl.arange(0, BLOCK_W)
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b_rows = convolve_rows(x, taps, i_image, i_y, o_x, o_c, height, width, C, K, BIAS, FLIP, BLOCK_W, BLOCK_C)
    p_s = o_x[:, None] * C + o_c[None, :]
    for i_row in tl.static_range(4):
        m_y = (o_x < columns_of(i_y + i_row, height, width))[:, None] & (o_c < C)[None, :]
        p_y = y + (i_image * height + i_y + i_row).to(tl.int64) * width * C
        tl.store(p_y + p_s, b_rows[i_row].to(y.dtype.element_ty), mask=m_y)


@triton.jit
def rows_of_strip(grad, x, i_image, i_new, i_end, o_x, o_c, height, width, C: tl.constexpr, K: tl.constexpr):
    # a row of the gradient and the K shifted ones of the input that are K // 2 above it: K + 1 tiles
    m_c = (o_c < C)[None, :]
    m_g = (o_x < columns_of(i_new, i_end, width))[:, None] & m_c
    p_row = (i_image * height + i_new).to(tl.int64) * width * C
    b_rows = (tl.load(grad + p_row + (o_x[:, None] * C + o_c[None, :]), mask=m_g, other=0.0),)
    i_in = i_new - K // 2
    i_columns = columns_of(i_in, height, width)
    p_row = (i_image * height + i_in).to(tl.int64) * width * C
    for i_k in tl.static_range(K):
        o_s = o_x + (i_k - K // 2)
        m_s = ((o_s >= 0) & (o_s < i_columns))[:, None] & m_c
        b_rows = b_rows + (tl.load(x + p_row + (o_s[:, None] * C + o_c[None, :]), mask=m_s, other=0.0),)
    return b_rows


@triton.jit(do_not_specialize=["height", "width", "strips"])
def depthwise_weight_bwd_kernel(
    grad, x, sums, strips, height, width,
    C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, STRIP: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # sums: (parts, K * K, C); b_sums: K^2 tiles, b_g: K rows of the gradient, newest first, b_x: (BLOCK_W, BLOCK_C);
    # the next row is read before the sums of this one, so that it is there when they are made
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_part = tl.program_id(0) // BLOCKS
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    i_across = tl.cdiv(width, BLOCK_W)
    i_down = tl.cdiv(height, STRIP)
    b_zero = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    b_sums = (b_zero,) * (K * K)
    for i_strip in range(i_part, strips, PARTS):
        i_image = i_strip // i_across // i_down
        i_y = i_strip // i_across % i_down * STRIP
        o_x = i_strip % i_across * BLOCK_W + tl.arange(0, BLOCK_W)
        i_end = tl.minimum(i_y + STRIP, height)
        b_g = (b_zero,) * K
        b_rows = rows_of_strip(grad, x, i_image, i_y, i_end, o_x, o_c, height, width, C, K)
        for i_new in range(i_y, i_end + K - 1):
            b_now = b_rows
            b_rows = rows_of_strip(grad, x, i_image, i_new + 1, i_end, o_x, o_c, height, width, C, K)
            b_g = (widened(b_now[0]),) + b_g[: K - 1]
            b_next = ()
            for i_k in tl.static_range(K):
                b_x = widened(b_now[1 + i_k])
                for i_row in tl.static_range(K):
                    b_next = b_next + (tl.fma(b_g[i_row], b_x, b_sums[i_k * K + i_row]),)
            b_sums = b_next
    p_sums = sums + i_part.to(tl.int64) * K * K * C + o_c
    for i_k in tl.static_range(K):
        for i_row in tl.static_range(K):
            tl.store(p_sums + (i_row * K + i_k) * C, tl.sum(b_sums[i_k * K + i_row], axis=0), mask=m_c)


def taps_of(weight, bias=None):
    """(C, 1, K, K) as (K * K, C) in fp32, so that neighbouring channels' taps are read together.

    A bias (C,) is one more row.
    """
    channels, _, _, size = weight.shape
    count = size * size
    taps = torch.empty(count + (bias is not None), channels, dtype=torch.float32, device=weight.device)
    taps[:count].copy_(weight.view(channels, count).t())
    if bias is not None:
        taps[count].copy_(bias)
    return taps


def rows_of(taps):
    """How many rows `taps_of` has made; 0 of None, where nothing is convolved."""
    return 0 if taps is None else len(taps)


def tiles_of(height, width, block_w):
    """How many tiles of ROWS x BLOCK_W pixels an image has."""
    return cdiv(height, ROWS) * cdiv(width, block_w)


@functools.cache
def _forward_tiles(size, channels):
    sides = [(32, 32), (32, 64), (64, 32), (16, 32)] if size == 4 else [(32, 64), (32, 32), (64, 32), (16, 64)]
    return [
        dict(BLOCK_W=w, BLOCK_C=side_of(channels, [c for c in (64, 32, 16) if c <= most]), num_warps=4)
        for w, most in sides
    ]


def depthwise(x, weight, bias=None, flip=False):
    """The convolution of a channels-last map (B, C, H, W) with (C, 1, K, K), plus (C,); ``flip``: with flipped taps."""
    batch, channels, height, width = x.shape
    size = weight.shape[-1]
    y = torch.empty_like(x)
    key = key_of(x, channels, size)
    tiles = config("depthwise_fwd", key, _forward_tiles(x.element_size(), channels), x.device)
    blocks = cdiv(channels, tiles["BLOCK_C"])
    launch(
        depthwise_fwd_kernel, (batch * tiles_of(height, width, tiles["BLOCK_W"]) * blocks,),
        x, taps_of(weight, bias), y, height, width, C=channels, K=size, BIAS=bias is not None, FLIP=flip, **tiles,
        work=Work(2 * x.numel() * x.element_size(), vector=2 * size * size * x.numel()),
    )  # fmt: skip
    return y


def depthwise_weight_gradient(grad, x, size):
    """The gradient of the (C, 1, size, size) weight, in fp32, from that of the output and the input."""
    batch, channels, height, width = x.shape
    shapes = [(16, 4), (8, 4), (16, 8), (8, 2)] if size <= 5 else [(8, 4), (16, 8)]  # registers hold the K^2 sums
    candidates = [dict(BLOCK_W=w, BLOCK_C=32, num_warps=n) for w, n in shapes]
    tiles = config("depthwise_weight_bwd", key_of(x, channels, size), candidates, x.device)
    strips = batch * cdiv(height, STRIP) * cdiv(width, tiles["BLOCK_W"])
    most = max(32, 65536 // channels)  # about 2048 programs, of 32 channels each
    parts = min(most, strips)
    sums = torch.empty(parts, size * size, channels, dtype=torch.float32, device=x.device)
    launch(
        depthwise_weight_bwd_kernel, (parts * cdiv(channels, tiles["BLOCK_C"]),),
        grad, x, sums, strips, height, width, C=channels, K=size, PARTS=most, STRIP=STRIP, **tiles,
        work=Work(2 * x.numel() * x.element_size(), vector=2 * size * size * x.numel()),
    )  # fmt: skip
    return sums.sum(dim=0).t().reshape(channels, 1, size, size)
