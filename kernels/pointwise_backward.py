"""The gradient through a layer norm and the pointwise convolution after it, to the input and the norm's parameters.

A program takes BLOCK_P pixels with all their channels: it multiplies the output's gradient by the weight, and takes the
product through the norm in fp32, so that the input's gradient is rounded once; then the next ones, while it adds up its
share of the gradients of the norm's parameters, which PyTorch adds up in the end. N + 2 C values a pixel, C more for a
residual. In two steps in fp32, where nothing is rounded in between, and where programs of all channels hold few pixels.
"""

import functools

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._images import alike, gradient_like, images_and_pixels, is_each_image, of_image
from ._launch import Work, block_of, cdiv, config, key_of, launch, matmul, precision
from .layer_norm_2d import PROGRAMS, layer_norm_2d_backward, norm_gradient
from .pointwise import map_of, pixels_of

WIDEST = 512  # channels that a program can hold
APART = dict(FUSED=False)  # the product is PyTorch's, and the norm's gradient a kernel of its own


@triton.jit(do_not_specialize=["pixels"])
def pointwise_norm_bwd_kernel(
    grad, weight, x, norm_weight, residual, grad_x, sums, pixels, eps,
    C: tl.constexpr, N: tl.constexpr, CENTERED: tl.constexpr, EACH_IMAGE: tl.constexpr, PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # b_x, b_s, b_g: (BLOCK_P, BLOCK_C), b_o: (BLOCK_P, BLOCK_K); sums: (images, programs, 2, C), of the norm's weight
    # and bias; pixels: of an image, if EACH_IMAGE
    i_program = tl.program_id(0)
    sums += i_program.to(tl.int64) * 2 * C
    if EACH_IMAGE:
        programs = tl.minimum(PROGRAMS, tl.cdiv(pixels, BLOCK_P))
        i_image = i_program // programs
        i_program %= programs
        grad, x = of_image(grad, i_image, pixels, N), of_image(x, i_image, pixels, C)
        grad_x, norm_weight = of_image(grad_x, i_image, pixels, C), of_image(norm_weight, i_image, 1, C)
        if residual is not None:
            residual = of_image(residual, i_image, pixels, C)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_gw = tl.zeros((BLOCK_C,), dtype=tl.float32)
    b_gb = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for i_block in range(i_program, tl.cdiv(pixels, BLOCK_P), PROGRAMS):
        o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
        m_p = o_p < pixels
        b_g = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        for i_k in range(0, N, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < N
            b_o = tl.load(grad + o_p[:, None] * N + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(weight + o_k[:, None] * C + o_c[None, :], mask=m_k[:, None] & m_c[None, :], other=0.0)
            b_g = dot(b_o, b_w, b_g, PRECISION)
        m_x = m_p[:, None] & m_c[None, :]
        p_x = o_p[:, None] * C + o_c[None, :]
        b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_gb += tl.sum(b_g, axis=0)
        b_nw = tl.load(norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_gx, b_n = norm_gradient(b_g, b_x, b_nw, m_x, eps, C, CENTERED, x.dtype.element_ty)
        b_gw += tl.sum(b_g * b_n, axis=0)
        if residual is not None:
            b_gx += tl.load(residual + p_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(grad_x + p_x, b_gx.to(grad_x.dtype.element_ty), mask=m_x)
    tl.store(sums + o_c, b_gw, mask=m_c)
    tl.store(sums + C + o_c, b_gb, mask=m_c)


@functools.cache
def _tiles(channels):
    block = block_of(channels)
    if block <= 64:
        shapes = [(64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3), (32, 64, 4, 3)]
    elif block == 128:
        shapes = [(64, 64, 8, 3), (32, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 3)]
    else:
        shapes = [(16, 32, 8, 3), (16, 64, 4, 2)][: 2 if block == 256 else 1]
    # Without a limit of its own the compiler may spill a few values to fit one more block on a multiprocessor.
    limit = dict(maxnreg=255) if block >= 128 else {}
    fused = [dict(BLOCK_P=p, BLOCK_C=block, BLOCK_K=k, num_warps=w, num_stages=s) | limit for p, k, w, s in shapes]
    return fused if block <= 128 else [APART, *fused]


def pointwise_norm_backward(grad, weight, x, norm_weight, norm_bias, eps, centered, residual=None):
    """Gradients of x, norm_weight and norm_bias in norm(x) W^T.

    Args:
        grad: of the output, a channels-last map (B, N, H, W) or a matrix (pixels, N).
        weight: (N, C, 1, 1), of the convolution.
        x: a channels-last map (B, C, H, W).
        norm_weight, norm_bias, eps, centered: of the norm.
        residual: a map that is added to the gradient of ``x``, before it is rounded.
    """
    outputs, channels = weight.shape[:2]
    grad = pixels_of(grad)
    norm = norm_weight, norm_bias, eps, centered
    tiles = APART
    if x.dtype != torch.float32 and channels <= WIDEST:
        tiles = config("pointwise_norm_bwd", key_of(x, channels, outputs), _tiles(channels), x.device)
    if tiles == APART:
        return layer_norm_2d_backward(map_of(matmul(grad, weight.flatten(1)), x), x, *norm, residual=residual)
    grad_x = torch.empty_like(x)
    each_image = is_each_image(norm_weight, norm_bias)
    images, pixels = images_and_pixels(x, channels, each_image)
    programs = min(PROGRAMS, cdiv(pixels, tiles["BLOCK_P"]))
    sums = torch.empty(images, programs, 2, channels, dtype=torch.float32, device=x.device)
    values = grad.numel() + weight.numel() + (2 if residual is None else 3) * x.numel()
    launch(
        pointwise_norm_bwd_kernel, (images * programs,),
        grad, weight, x, alike(x.shape[0], norm_weight, norm_bias)[0], residual, grad_x, sums, pixels, eps,
        C=channels, N=outputs, CENTERED=centered, EACH_IMAGE=each_image, PRECISION=precision(x), PROGRAMS=PROGRAMS,
        **tiles,
        work=Work(values * x.element_size(), matrix=2 * channels * grad.numel(), vector=20 * x.numel()),
    )  # fmt: skip
    grad_weight, grad_bias = sums.sum(dim=1).unbind(dim=1)
    return grad_x, gradient_like(grad_weight, norm_weight), gradient_like(grad_bias, norm_bias)
