"""residual + PW(channel_gate * x + pixel_gate * other) + bias: see ipt_fast.ops.gated_projection.

Forward, one kernel: a program takes BLOCK_P pixels and as many outputs as its registers hold. It reads both maps by
blocks of channels, mixes them in fp32 and multiplies the mixture, rounded to the dtype of the maps, by the weight: the
mixture never reaches memory. Traffic a pixel, for C channels and N outputs: 2 C + N values, N more for a residual. Up
to 256 outputs (64 in fp32) both maps are read once.

Backward: the gradient of the mixture is a product of matrices. A kernel reads it beside both maps and writes all that
follows from it, the mixture included, of which the weight's gradient is made: 3 C values in, 3 C out. As in
layer_norm_2d.py, each of PROGRAMS programs adds up the channel gate's gradient over its own pixels, and PyTorch adds up
those sums.
"""

import functools

import torch
import triton
import triton.language as tl

from ._dot import dot
from ._images import gradient_like, images_and_pixels, is_each_image, of_image
from ._launch import Work, block_of, cdiv, config, key_of, launch, matmul, precision
from .layer_norm_2d import PROGRAMS
from .pointwise import empty_map, gated_residual, pixels_of, plus_bias
from .projection_backward import bias_gradient


@triton.jit(do_not_specialize=["pixels"])
def gated_projection_fwd_kernel(
    x, other, channel_gate, pixel_gate, weight, bias, residual, y, pixels,
    C: tl.constexpr, N: tl.constexpr, EACH_IMAGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # b_x, b_other: (BLOCK_P, BLOCK_K), b_w: (BLOCK_K, BLOCK_N), b_y: (BLOCK_P, BLOCK_N); pixels: of an image, if
    # EACH_IMAGE
    GROUPS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    o_n = tl.program_id(0) % GROUPS * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    i_block = tl.program_id(0) // GROUPS
    if EACH_IMAGE:
        i_image = i_block // tl.cdiv(pixels, BLOCK_P)
        i_block %= tl.cdiv(pixels, BLOCK_P)
        x, other = of_image(x, i_image, pixels, C), of_image(other, i_image, pixels, C)
        channel_gate, pixel_gate = of_image(channel_gate, i_image, 1, C), of_image(pixel_gate, i_image, pixels, 1)
        y = of_image(y, i_image, pixels, N)
        if residual is not None:
            residual = of_image(residual, i_image, pixels, N)
    o_p = i_block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < pixels
    b_pixel = tl.load(pixel_gate + o_p, mask=m_p, other=0.0).to(tl.float32)[:, None]
    b_y = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for i_k in range(0, C, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < C
        m_x = m_p[:, None] & m_k[None, :]
        p_x = o_p[:, None] * C + o_k[None, :]
        b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_other = tl.load(other + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_channel = tl.load(channel_gate + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        b_mixed = tl.fma(b_x, b_channel, b_other * b_pixel).to(x.dtype.element_ty)
        p_w = weight + o_n[None, :] * C + o_k[:, None]
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_y = dot(b_mixed, b_w, b_y, PRECISION)
    p_y = o_p[:, None] * N + o_n[None, :]
    m_y = m_p[:, None] & m_n[None, :]
    b_y = gated_residual(plus_bias(b_y, bias, o_n, m_n), None, residual, p_y, o_n, m_n, m_y)
    tl.store(y + p_y, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["pixels"])
def gated_mixture_bwd_kernel(
    grad, x, other, channel_gate, pixel_gate, mixed, grad_x, grad_other, grad_pixel, sums, pixels,
    C: tl.constexpr, EACH_IMAGE: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # grad: of the mixture; b_g, b_x, b_other, b_sum: (BLOCK_P, BLOCK_C); sums: (images, programs, C), of the channel
    # gate; pixels: of an image, if EACH_IMAGE
    DTYPE: tl.constexpr = x.dtype.element_ty
    i_program = tl.program_id(0)
    sums += i_program.to(tl.int64) * C
    if EACH_IMAGE:
        programs = tl.minimum(PROGRAMS, tl.cdiv(pixels, BLOCK_P))
        i_image = i_program // programs
        i_program %= programs
        grad, x = of_image(grad, i_image, pixels, C), of_image(x, i_image, pixels, C)
        other, mixed = of_image(other, i_image, pixels, C), of_image(mixed, i_image, pixels, C)
        grad_x, grad_other = of_image(grad_x, i_image, pixels, C), of_image(grad_other, i_image, pixels, C)
        pixel_gate, grad_pixel = of_image(pixel_gate, i_image, pixels, 1), of_image(grad_pixel, i_image, pixels, 1)
        channel_gate = of_image(channel_gate, i_image, 1, C)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_channel = tl.load(channel_gate + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)  # added up over pixels in the end alone
    for i_block in range(i_program, tl.cdiv(pixels, BLOCK_P), PROGRAMS):
        o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
        m_p = o_p < pixels
        m_x = m_p[:, None] & m_c[None, :]
        p_x = o_p[:, None] * C + o_c[None, :]
        b_pixel = tl.load(pixel_gate + o_p, mask=m_p, other=0.0).to(tl.float32)[:, None]
        b_g = tl.load(grad + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_sum += b_g * b_x
        tl.store(grad_x + p_x, (b_g * b_channel).to(DTYPE), mask=m_x)
        b_other = tl.load(other + p_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(grad_pixel + o_p, tl.sum(b_g * b_other, axis=1).to(DTYPE), mask=m_p)
        tl.store(grad_other + p_x, (b_g * b_pixel).to(DTYPE), mask=m_x)
        tl.store(mixed + p_x, tl.fma(b_x, b_channel, b_other * b_pixel).to(DTYPE), mask=m_x)
    tl.store(sums + o_c, tl.sum(b_sum, axis=0), mask=m_c)


@functools.cache
def _forward_tiles(size, outputs):
    # Both maps are read once for a group of outputs, and there is much to read for few products: groups are wide.
    if size == 4:  # where a limit keeps the compiler from spilling a few values to fit one more block
        shapes = [(64, 16, 64, 4, 2, 192), (32, 32, 32, 4, 2, 96), (128, 16, 64, 8, 2, 128)]
    elif outputs <= 128:
        shapes = [(64, 64, 128, 4, 3), (128, 64, 128, 8, 3), (64, 32, 128, 4, 3), (32, 64, 128, 4, 3)]
    else:
        shapes = [(64, 32, 256, 8, 3), (32, 64, 256, 8, 3), (64, 64, 256, 8, 2), (64, 64, 128, 4, 3)]
    return [
        dict(BLOCK_P=p, BLOCK_K=k, BLOCK_N=min(n, block_of(outputs)), num_warps=w, num_stages=s)
        | ({"maxnreg": limit[0]} if limit else {})
        for p, k, n, w, s, *limit in shapes
    ]


def gated_projection(x, other, channel_gate, pixel_gate, weight, bias, residual):
    outputs, channels = weight.shape[:2]
    each_image = is_each_image(channel_gate)
    images, pixels = images_and_pixels(x, channels, each_image)
    key = key_of(x, channels, outputs)
    tiles = config("gated_projection_fwd", key, _forward_tiles(x.element_size(), outputs), x.device)
    y = empty_map(x, outputs)
    values = 2 * x.numel() + pixel_gate.numel() + weight.numel() + y.numel() * (1 if residual is None else 2)
    launch(
        gated_projection_fwd_kernel,
        (images * cdiv(pixels, tiles["BLOCK_P"]) * cdiv(outputs, tiles["BLOCK_N"]),),
        x, other, channel_gate, pixel_gate, weight, bias, residual, y, pixels,
        C=channels, N=outputs, EACH_IMAGE=each_image, PRECISION=precision(x), **tiles,
        work=Work(values * x.element_size(), matrix=2 * channels * y.numel(), vector=4 * x.numel()),
    )  # fmt: skip
    return y


def _mixture_backward(grad, x, other, channel_gate, pixel_gate):
    """The mixture, and the gradients of both maps and both gates from that of the mixture, a matrix of pixels."""
    channels, each_image = x.shape[1], is_each_image(channel_gate)
    images, pixels = images_and_pixels(x, channels, each_image)
    block = block_of(channels)
    shapes = (2048, 4), (1024, 4), (4096, 8)
    candidates = [dict(BLOCK_P=max(1, n // block), BLOCK_C=block, num_warps=w) for n, w in shapes]
    tiles = config("gated_mixture_bwd", key_of(x, channels), candidates, x.device)
    programs = min(PROGRAMS, cdiv(pixels, tiles["BLOCK_P"]))
    mixed, grad_x, grad_other, grad_pixel = (torch.empty_like(each) for each in (x, x, x, pixel_gate))
    sums = torch.empty(images, programs, channels, dtype=torch.float32, device=x.device)
    launch(
        gated_mixture_bwd_kernel, (images * programs,),
        grad, x, other, channel_gate, pixel_gate, mixed, grad_x, grad_other, grad_pixel, sums, pixels,
        C=channels, EACH_IMAGE=each_image, PROGRAMS=PROGRAMS, **tiles,
        work=Work((6 * x.numel() + 2 * pixel_gate.numel()) * x.element_size(), vector=10 * x.numel()),
    )  # fmt: skip
    return mixed, grad_x, grad_other, gradient_like(sums.sum(dim=1), channel_gate), grad_pixel


def gated_projection_backward(grad, x, other, channel_gate, pixel_gate, weight, bias, residual):
    of_outputs = pixels_of(grad)
    of_mixed = matmul(of_outputs, weight.flatten(1))
    mixed, *grads = _mixture_backward(of_mixed, x, other, channel_gate, pixel_gate)
    grad_weight = matmul(of_outputs.t(), pixels_of(mixed)).view_as(weight)
    grad_residual = None if residual is None else grad.clone()  # never the upstream one itself
    return *grads, grad_weight, bias_gradient(grad, bias), grad_residual
