"""The gradients of residual + gate * (x W^T + bias), what ends a layer, and of biases.

A gradient of a gate is a sum over pixels of the output's gradient times the branch, which is made again; nothing is
divided by the gate. One kernel adds up those products and the gradients themselves, of which a bias's is made, and
writes the gradient of the branch: 3 C values a pixel with a gate (2 read, 1 written), 1 C where only a bias asks. As in
layer_norm_2d.py, each of PROGRAMS programs adds up its own pixels, and PyTorch adds up those sums.
"""

import torch
import triton
import triton.language as tl

from ._images import gradient_like, images_and_pixels, is_each_image, of_image
from ._launch import Work, block_of, cdiv, config, key_of, launch, matmul
from .layer_norm_2d import PROGRAMS
from .pointwise import pixels_of, pointwise


@triton.jit(do_not_specialize=["pixels"])
def channel_sums_kernel(
    grad, branch, gate, grad_branch, sums, pixels,
    C: tl.constexpr, EACH_IMAGE: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # b_g, b_sum, b_product: (BLOCK_P, BLOCK_C); sums: (images, programs, 2, C), of grad and of grad * branch;
    # grad_branch is gate * grad. Without a gate there are but the sums (images, programs, 1, C) of grad.
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    SUMS: tl.constexpr = 1 if gate is None else 2
    i_program = tl.program_id(0) // BLOCKS
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    sums += i_program.to(tl.int64) * SUMS * C
    if EACH_IMAGE:
        programs = tl.minimum(PROGRAMS, tl.cdiv(pixels, BLOCK_P))
        i_image = i_program // programs
        i_program %= programs
        grad, branch = of_image(grad, i_image, pixels, C), of_image(branch, i_image, pixels, C)
        grad_branch, gate = of_image(grad_branch, i_image, pixels, C), of_image(gate, i_image, 1, C)
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)  # added up over pixels in the end alone
    if gate is not None:
        b_product = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        b_gate = tl.load(gate + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for i_block in range(i_program, tl.cdiv(pixels, BLOCK_P), PROGRAMS):
        o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
        m_x = (o_p < pixels)[:, None] & m_c[None, :]
        p_x = o_p[:, None] * C + o_c[None, :]
        b_g = tl.load(grad + p_x, mask=m_x, other=0.0).to(tl.float32)
        b_sum += b_g
        if gate is not None:
            b_product += b_g * tl.load(branch + p_x, mask=m_x, other=0.0).to(tl.float32)
            tl.store(grad_branch + p_x, (b_g * b_gate).to(grad_branch.dtype.element_ty), mask=m_x)
    tl.store(sums + o_c, tl.sum(b_sum, axis=0), mask=m_c)
    if gate is not None:
        tl.store(sums + C + o_c, tl.sum(b_product, axis=0), mask=m_c)


def _channel_sums(grad, branch=None, gate=None, grad_branch=None):
    """Sums (images, 2, channels) of `channel_sums_kernel`, of maps, or without a gate of a matrix."""
    channels, each_image = grad.shape[1], is_each_image(gate)
    images, pixels = images_and_pixels(grad, channels, each_image)
    block = min(128, block_of(channels))
    candidates = [
        dict(BLOCK_P=values // block, BLOCK_C=block, num_warps=warps)
        for values, warps in ((2048, 4), (4096, 8), (1024, 4))
    ]
    tiles = config("channel_sums", key_of(grad, channels), candidates, grad.device)
    programs = min(PROGRAMS, cdiv(pixels, tiles["BLOCK_P"]))
    sums = torch.empty(images, programs, 1 if gate is None else 2, channels, dtype=torch.float32, device=grad.device)
    launch(
        channel_sums_kernel, (images * programs * cdiv(channels, block),),
        grad, branch, gate, grad_branch, sums, pixels,
        C=channels, EACH_IMAGE=each_image, PROGRAMS=PROGRAMS, **tiles,
        work=Work((1 if gate is None else 3) * grad.numel() * grad.element_size(), vector=4 * grad.numel()),
    )  # fmt: skip
    return sums.sum(dim=1)


def bias_gradient(grad, bias):
    """Of a bias (C,) or None, from the gradient of the map or matrix it was added to."""
    return None if bias is None else gradient_like(_channel_sums(grad)[:, 0], bias)


def projection_gradients(grad, x, weight, bias, gate):
    """Of the branch x W^T + bias, a matrix of pixels, and of weight, bias and gate, in gate * (x W^T + bias).

    Args:
        grad: of the output, a channels-last map (B, N, H, W).
        x: a channels-last map (B, C, H, W).
        weight, bias: (N, C, 1, 1), and (N,) or None.
        gate: (N,), (B, N) or None.
    """
    grad_bias = grad_gate = None
    if gate is None:
        grad_bias = bias_gradient(grad, bias)
    else:
        branch, grad_branch = pointwise(x, weight, bias=bias), torch.empty_like(grad)
        of_grad, products = _channel_sums(grad, branch, gate, grad_branch).unbind(dim=1)
        grad_gate, grad = gradient_like(products, gate), grad_branch
        if bias is not None:
            grad_bias = gradient_like(of_grad * gate.float(), bias)
    grad = pixels_of(grad)
    return grad, matmul(grad.t(), pixels_of(x)).view_as(weight), grad_bias, grad_gate
