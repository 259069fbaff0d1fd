"""What feed-forward networks do between their projections: depthwise convolution, GELU and gates.

Forward: the convolution of depthwise.py with one of `FORMS` after it, in its registers: the hidden map in, what is
projected out. Backward: the convolved map and its gradient in, that of what was convolved out; a pass of its own.
"""

import functools

import torch
import triton
import triton.language as tl

from ._gelu import gelu, gelu_slope
from ._launch import Work, block_of, cdiv, config, key_of, launch
from .depthwise import columns_of, convolve_rows, taps_of, tile_position, tiles_of
from .pointwise import empty_map, side_of

# Of the convolved map c and a map beside it b. The first and second halves of c: c1, c2.
FORMS = ("gelu", "added", "gated", "multiplied")  # GELU(c), b + GELU(c), GELU(c1) c2, b c


@triton.jit(do_not_specialize=["height", "width"])
def form_fwd_kernel(
    x, taps, beside, y, height, width,
    C: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, FORM: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # x: C channels, y and beside: N; a row of b_rows and b_more: (BLOCK_W, BLOCK_C)
    BLOCKS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C
    DTYPE: tl.constexpr = y.dtype.element_ty
    i_image, i_y, i_x = tile_position(tl.program_id(0) // BLOCKS, height, width, BLOCK_W)
    o_x = i_x + tl.arange(0, BLOCK_W)
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b_rows = convolve_rows(x, taps, i_image, i_y, o_x, o_c, height, width, C, K, BIAS, False, BLOCK_W, BLOCK_C)
    if FORM == "gated":
        b_more = convolve_rows(x, taps, i_image, i_y, o_x, N + o_c, height, width, C, K, BIAS, False, BLOCK_W, BLOCK_C)
    p_s = o_x[:, None] * N + o_c[None, :]
    for i_row in tl.static_range(4):
        m_y = (o_x < columns_of(i_y + i_row, height, width))[:, None] & (o_c < N)[None, :]
        p_row = (i_image * height + i_y + i_row).to(tl.int64) * width * N
        b_y = b_rows[i_row]
        if FORM != "multiplied":
            b_y = gelu(b_y, DTYPE)
        if FORM == "gated":
            b_y *= b_more[i_row]
        elif FORM != "gelu":
            b_beside = tl.load(beside + p_row + p_s, mask=m_y, other=0.0).to(tl.float32)
            b_y = b_y + b_beside if FORM == "added" else b_y * b_beside
        tl.store(y + p_row + p_s, b_y.to(DTYPE), mask=m_y)


@functools.cache
def _forward_tiles(size, channels):
    sides = [(32, 32), (16, 32), (32, 64)] if size == 4 else [(32, 32), (32, 64), (64, 32), (16, 64)]
    return [
        dict(BLOCK_W=w, BLOCK_C=side_of(channels, [c for c in (64, 32, 16) if c <= most]), num_warps=4)
        for w, most in sides
    ]


def formed(form, x, weight, bias, beside=None):
    """One of `FORMS` of the convolution of ``x`` with (C, 1, K, K), plus (C,), and of the map ``beside`` it."""
    batch, channels, height, width = x.shape
    outputs, size = channels // 2 if form == "gated" else channels, weight.shape[-1]
    y = empty_map(x, outputs)
    tiles = config(f"{form}_fwd", key_of(x, channels, size), _forward_tiles(x.element_size(), outputs), x.device)
    maps = x.numel() + y.numel() * (1 if beside is None else 2)
    launch(
        form_fwd_kernel, (batch * tiles_of(height, width, tiles["BLOCK_W"]) * cdiv(outputs, tiles["BLOCK_C"]),),
        x, taps_of(weight, bias), beside, y, height, width,
        C=channels, N=outputs, K=size, BIAS=bias is not None, FORM=form, **tiles,
        work=Work(maps * x.element_size(), vector=2 * size * size * x.numel() + 16 * y.numel()),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["pixels"])
def gelu_bwd_kernel(
    grad, added, x, grad_x, pixels, N: tl.constexpr, GATED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    # of x in GELU(x), N channels, or in GELU(x1) x2, twice as many; b_g, b_x: (BLOCK_P, BLOCK_C)
    BLOCKS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C
    C: tl.constexpr = 2 * N if GATED else N
    DTYPE: tl.constexpr = x.dtype.element_ty
    o_p = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_x = (o_p < pixels)[:, None] & (o_c < N)[None, :]
    p_g = o_p[:, None] * N + o_c[None, :]
    p_x = o_p[:, None] * C + o_c[None, :]
    b_g = tl.load(grad + p_g, mask=m_x, other=0.0).to(tl.float32)
    if added is not None:
        b_g += tl.load(added + p_g, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32)
    b_first = b_g * gelu_slope(b_x, DTYPE)
    if GATED:
        b_first *= tl.load(x + p_x + N, mask=m_x, other=0.0).to(tl.float32)
        tl.store(grad_x + p_x + N, (b_g * gelu(b_x, DTYPE)).to(DTYPE), mask=m_x)
    tl.store(grad_x + p_x, b_first.to(DTYPE), mask=m_x)


def gelu_backward(grad, x, added=None, gated=False):
    """The gradient of a map ``x`` from ``grad`` (+ ``added``), those of GELU(x), or of GELU(x1) x2 if ``gated``."""
    channels, grad_x = grad.shape[1], torch.empty_like(x)
    pixels, block = grad.numel() // channels, min(128, block_of(channels))
    candidates = [dict(BLOCK_P=n // block, BLOCK_C=block, num_warps=4) for n in (2048, 1024, 4096)]
    name = "gated_bwd" if gated else "gelu_bwd"
    tiles = config(name, key_of(x, channels), candidates, x.device)
    maps = 2 * x.numel() + grad.numel() * (1 if added is None else 2)
    launch(
        gelu_bwd_kernel, (cdiv(pixels, tiles["BLOCK_P"]) * cdiv(channels, block),),
        grad, added, x, grad_x, pixels, N=channels, GATED=gated, **tiles,
        work=Work(maps * x.element_size(), vector=24 * x.numel()),
    )  # fmt: skip
    return grad_x
