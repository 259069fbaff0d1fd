"""Layer norm over the channels of every pixel, in both kinds; see ipt_fast.ops.layer_norm_2d.

Forward: read x, write y, 2 C values a pixel. Backward: read x and the gradient, write one; each of PROGRAMS programs
adds up the gradients of weight and bias over its own pixels, and PyTorch adds up those sums. The tokens of IPT are
pixels too: `add_layer_norm` adds a branch to the residual stream on its way, 4 C values a token. Where each image has
parameters of its own (EACH_IMAGE), a program stays in one image, and there are PROGRAMS for every image.
"""

import functools

import torch
import triton
import triton.language as tl

from ._images import alike, gradient_like, images_and_pixels, is_each_image, of_image
from ._launch import Work, block_of, cdiv, config, key_of, launch

PROGRAMS = 512  # of the backward: a number of its own, so that sums are in the same order on every GPU


@triton.jit(do_not_specialize=["pixels"])
def layer_norm_2d_fwd_kernel(
    x, branch, weight, bias, total, y, pixels, eps,
    C: tl.constexpr, CENTERED: tl.constexpr, EACH_IMAGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # b_x, b_s, b_y: (BLOCK_P, BLOCK_C); pixels: of an image, if EACH_IMAGE
    i_block = tl.program_id(0)
    if EACH_IMAGE:
        i_image = i_block // tl.cdiv(pixels, BLOCK_P)
        i_block %= tl.cdiv(pixels, BLOCK_P)
        x, y = of_image(x, i_image, pixels, C), of_image(y, i_image, pixels, C)
        weight = of_image(weight, i_image, 1, C)
        if bias is not None:
            bias = of_image(bias, i_image, 1, C)
    o_p = i_block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_x = (o_p < pixels)[:, None] & m_c[None, :]
    p_x = o_p[:, None] * C + o_c[None, :]
    b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32)
    if branch is not None:
        b_x += tl.load(branch + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_total = b_x.to(total.dtype.element_ty)
        tl.store(total + p_x, b_total, mask=m_x)
        b_x = b_total.to(tl.float32)  # the norm of what the backward will see
    b_mean = tl.sum(b_x, axis=1) / C
    b_s = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_s * b_s, axis=1) / C + eps)
    b_y = (b_s if CENTERED else b_x) * b_rstd[:, None]
    b_y *= tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y + p_x, b_y.to(y.dtype.element_ty), mask=m_x)


@triton.jit
def norm_gradient(b_g, b_x, b_w, m_x, eps, C: tl.constexpr, CENTERED: tl.constexpr, DTYPE: tl.constexpr):
    # of x, which is DTYPE in memory, from that of n w (+ bias), and n itself: (BLOCK_P, BLOCK_C) each
    b_mean = tl.sum(b_x, axis=1) / C
    b_s = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    if tl.float32 == DTYPE:  # where x hardly varies, the mean's own rounding is no small part of what is left
        b_s = tl.where(m_x, b_s - (tl.sum(b_s, axis=1) / C)[:, None], 0.0)
    b_rstd = (1.0 / tl.sqrt(tl.sum(b_s * b_s, axis=1) / C + eps))[:, None]
    b_n = (b_s if CENTERED else b_x) * b_rstd
    b_g *= b_w[None, :]
    b_gx = b_g - b_s * b_rstd * (tl.sum(b_g * b_n, axis=1) / C)[:, None]
    if CENTERED:
        b_gx -= (tl.sum(b_g, axis=1) / C)[:, None]
    return b_gx * b_rstd, b_n


@triton.jit(do_not_specialize=["pixels"])
def layer_norm_2d_bwd_kernel(
    grad, x, weight, residual, grad_x, sums, pixels, eps,
    C: tl.constexpr, CENTERED: tl.constexpr, EACH_IMAGE: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # b_x, b_s, b_g, b_gw, b_gb: (BLOCK_P, BLOCK_C); sums: (images, programs, 2, C), of weight and bias
    i_program = tl.program_id(0)
    sums += i_program.to(tl.int64) * 2 * C
    if EACH_IMAGE:
        programs = tl.minimum(PROGRAMS, tl.cdiv(pixels, BLOCK_P))
        i_image = i_program // programs
        i_program %= programs
        grad, x = of_image(grad, i_image, pixels, C), of_image(x, i_image, pixels, C)
        grad_x, weight = of_image(grad_x, i_image, pixels, C), of_image(weight, i_image, 1, C)
        if residual is not None:
            residual = of_image(residual, i_image, pixels, C)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_gw = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)  # added up over pixels in the end alone
    b_gb = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for i_block in range(i_program, tl.cdiv(pixels, BLOCK_P), PROGRAMS):
        o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
        m_x = (o_p < pixels)[:, None] & m_c[None, :]
        p_x = o_p[:, None] * C + o_c[None, :]
        b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_g = tl.load(grad + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_gb += b_g
        b_gx, b_n = norm_gradient(b_g, b_x, b_w, m_x, eps, C, CENTERED, x.dtype.element_ty)
        b_gw += b_g * b_n
        if residual is not None:
            b_gx += tl.load(residual + p_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(grad_x + p_x, b_gx.to(grad_x.dtype.element_ty), mask=m_x)
    tl.store(sums + o_c, tl.sum(b_gw, axis=0), mask=m_c)
    tl.store(sums + C + o_c, tl.sum(b_gb, axis=0), mask=m_c)


@functools.cache
def _tiles(shapes, block_c):
    """Configurations of about so many values a tile and so many warps."""
    return [dict(BLOCK_P=max(1, n // block_c), BLOCK_C=block_c, num_warps=warps) for n, warps in shapes]


def _forward(x, branch, weight, bias, total, y, eps, centered):
    """Rows of channels, whatever else ``x`` and the others have: (..., C) in memory."""
    channels, each_image = weight.shape[-1], is_each_image(weight, bias)
    weight, bias = alike(x.shape[0], weight, bias)
    images, pixels = images_and_pixels(x, channels, each_image)
    shapes = (4096, 4), (2048, 4), (8192, 4)
    tiles = config("layer_norm_2d_fwd", key_of(x, channels), _tiles(shapes, block_of(channels)), x.device)
    maps = [each for each in (x, branch, total, y) if each is not None]
    launch(
        layer_norm_2d_fwd_kernel, (images * cdiv(pixels, tiles["BLOCK_P"]),),
        x, branch, weight, bias, total, y, pixels, eps,
        C=channels, CENTERED=centered, EACH_IMAGE=each_image, **tiles,
        work=Work(sum(each.numel() * each.element_size() for each in maps), vector=8 * x.numel()),
    )  # fmt: skip


def _backward(grad, x, weight, bias, eps, centered, residual):
    channels, each_image = weight.shape[-1], is_each_image(weight, bias)
    images, pixels = images_and_pixels(x, channels, each_image)
    grad_x = torch.empty_like(x)
    shapes = [(2048, 4), (1024, 4), (4096, 4), (4096, 8), (2048, 8)]
    if channels > 256:  # where a row is more than a warp reads at once, registers are short
        shapes[:2] = reversed(shapes[:2])
    tiles = config("layer_norm_2d_bwd", key_of(x, channels), _tiles(tuple(shapes), block_of(channels)), x.device)
    programs = min(PROGRAMS, cdiv(pixels, tiles["BLOCK_P"]))
    sums = torch.empty(images, programs, 2, channels, dtype=torch.float32, device=x.device)
    maps = [each for each in (grad, x, residual, grad_x) if each is not None]
    launch(
        layer_norm_2d_bwd_kernel, (images * programs,),
        grad, x, alike(x.shape[0], weight, bias)[0], residual, grad_x, sums, pixels, eps,
        C=channels, CENTERED=centered, EACH_IMAGE=each_image, PROGRAMS=PROGRAMS, **tiles,
        work=Work(sum(each.numel() * each.element_size() for each in maps), vector=20 * x.numel()),
    )  # fmt: skip
    grad_weight, grad_bias = sums.sum(dim=1).unbind(dim=1)
    return grad_x, gradient_like(grad_weight, weight), gradient_like(grad_bias, bias)


def layer_norm_2d(x, weight, bias, eps, centered):
    y = torch.empty_like(x)
    _forward(x, None, weight, bias, None, y, eps, centered)
    return y


def layer_norm_2d_backward(grad, x, weight, bias, eps, centered, residual=None):
    """``residual``: a map that is added to the gradient of ``x``, before it is rounded."""
    return _backward(grad, x, weight, bias, eps, centered, residual)


def add_layer_norm(x, branch, weight, bias, eps, dtype):
    """(t = x + branch in the dtype of ``x``, LN(t) in ``dtype``) of tokens (B, N, C); t is ``x`` without a branch."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if branch is None:
        _forward(x, None, weight, bias, None, y, eps, True)
        return x, y
    total = torch.empty_like(x)
    _forward(x, branch.contiguous(), weight, bias, total, y, eps, True)
    return total, y


def add_layer_norm_backward(grad, total, weight, bias, eps, residual=None):
    """Gradients of t, to which ``residual`` is added before it is rounded, of weight and of bias."""
    residual = residual if residual is None else residual.contiguous()
    return _backward(grad.contiguous(), total, weight, bias, eps, True, residual)
