"""Locally enhanced feed-forward network: see ipt_fast.ops.leffn and ipt_fast.ops.leffn_layer.

Forward, two kernels: the pointwise expansion with GELU (and the layer's norm before it), then the projection, whose
program convolves blocks of hidden channels for its 4 x BLOCK_W pixels and multiplies them on the spot, so that the
convolved map never reaches memory. Traffic a pixel, for C channels and M hidden ones: C + M and M + C (+ C) values.
Where maps are wide and therefore small, that leaves much of a GPU idle: there the convolution is a kernel of its own.

Backward: the hidden map is made again, then the convolved one, the gradient of which lies in memory for the gradient of
the depthwise weight. The gradient before GELU comes from a convolution with flipped taps, beside which GELU's argument
is made once more from x, a product of matrices. At most two maps of M channels are in memory at a time.
"""

import functools

import triton
import triton.language as tl

from ._dot import dot
from ._gelu import gelu_slope
from ._images import is_each_image, of_image
from ._launch import Work, block_of, cdiv, config, key_of, launch, matmul, precision
from .depthwise import (
    convolve_rows,
    depthwise,
    depthwise_weight_gradient,
    stack_rows,
    taps_of,
    tile_pixels,
    tile_position,
    tiles_of,
)
from .layer_norm_2d import layer_norm_2d
from .pointwise import empty_map, gated_residual, map_of, pixels_of, plus_bias, pointwise, side_of
from .pointwise_backward import pointwise_norm_backward
from .projection_backward import bias_gradient, projection_gradients


@triton.jit(do_not_specialize=["height", "width"])
def leffn_project_fwd_kernel(
    hidden, taps, weight, bias, gate, residual, y, height, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, EACH_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # b_h: (4 * BLOCK_W, BLOCK_C), b_w: (BLOCK_C, BLOCK_N), b_y: (4 * BLOCK_W, BLOCK_N); BIAS: of the taps; gate: of
    # each image, if EACH_IMAGE
    GROUPS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_image, i_y, i_x = tile_position(tl.program_id(0) // GROUPS, height, width, BLOCK_W)
    o_x = i_x + tl.arange(0, BLOCK_W)
    o_n = tl.program_id(0) % GROUPS * BLOCK_N + tl.arange(0, BLOCK_N)
    b_y = tl.zeros((4 * BLOCK_W, BLOCK_N), dtype=tl.float32)
    for i_c in range(0, M, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_rows = convolve_rows(hidden, taps, i_image, i_y, o_x, o_c, height, width, M, K, BIAS, False, BLOCK_W, BLOCK_C)
        b_h = stack_rows(b_rows[0], b_rows[1], b_rows[2], b_rows[3], BLOCK_W, BLOCK_C)
        m_w = (o_c < M)[:, None] & (o_n < N)[None, :]
        b_w = tl.load(weight + o_n[None, :] * M + o_c[:, None], mask=m_w, other=0.0)
        b_y = dot(b_h.to(weight.dtype.element_ty), b_w, b_y, PRECISION)
    o_p, m_p = tile_pixels(i_image, i_y, i_x, height, width, BLOCK_W)
    p_y = o_p[:, None] * N + o_n[None, :]
    m_y = m_p[:, None] & (o_n < N)[None, :]
    if EACH_IMAGE:
        gate = of_image(gate, i_image, 1, N)
    b_y = gated_residual(plus_bias(b_y, bias, o_n, o_n < N), gate, residual, p_y, o_n, o_n < N, m_y)
    tl.store(y + p_y, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["height", "width"])
def leffn_hidden_bwd_kernel(
    grad, taps, x, weight, bias, grad_u, height, width,
    C: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # u = x W^T + bias, before GELU; b_u, b_g: (4 * BLOCK_W, BLOCK_C), b_x: (4 * BLOCK_W, BLOCK_K), b_w: (BLOCK_K,
    # BLOCK_C)
    BLOCKS: tl.constexpr = (M + BLOCK_C - 1) // BLOCK_C
    i_image, i_y, i_x = tile_position(tl.program_id(0) // BLOCKS, height, width, BLOCK_W)
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < M
    o_p, m_p = tile_pixels(i_image, i_y, i_x, height, width, BLOCK_W)
    b_u = tl.zeros((4 * BLOCK_W, BLOCK_C), dtype=tl.float32)
    for i_k in range(0, C, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < C
        b_x = tl.load(x + o_p[:, None] * C + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(weight + o_c[None, :] * C + o_k[:, None], mask=m_k[:, None] & m_c[None, :], other=0.0)
        b_u = dot(b_x, b_w, b_u, PRECISION)
    b_slope = gelu_slope(plus_bias(b_u, bias, o_c, m_c), x.dtype.element_ty)
    o_x = i_x + tl.arange(0, BLOCK_W)
    b_rows = convolve_rows(grad, taps, i_image, i_y, o_x, o_c, height, width, M, K, False, True, BLOCK_W, BLOCK_C)
    b_g = stack_rows(b_rows[0], b_rows[1], b_rows[2], b_rows[3], BLOCK_W, BLOCK_C) * b_slope
    p_u = o_p[:, None] * M + o_c[None, :]
    tl.store(grad_u + p_u, b_g.to(grad_u.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


APART = dict(FUSED=False)  # the convolution and the projection each in a kernel of its own


@functools.cache
def _project_tiles(size, outputs):
    if size == 4:
        shapes = [(16, 32, 64, 4), (16, 16, 64, 4), (32, 16, 64, 8), (32, 16, 32, 4)]
    elif outputs <= 64:
        shapes = [(32, 32, 64, 4), (64, 32, 64, 8), (32, 64, 64, 8), (16, 64, 64, 4), (16, 64, 64, 8)]
    elif outputs <= 128:
        shapes = [(32, 64, 128, 8), (16, 64, 128, 4), (16, 64, 128, 8), (32, 32, 128, 4), (64, 32, 128, 8)]
    elif outputs <= 256:
        shapes = [(16, 64, 256, 4), (16, 64, 256, 8), (32, 64, 256, 8), (32, 64, 128, 8)]
    else:
        shapes = [(8, 64, 512, 8), (16, 32, 512, 8), (32, 64, 256, 8)]
    fused = [
        dict(BLOCK_W=w, BLOCK_C=c, BLOCK_N=min(n, block_of(outputs)), num_warps=warps, num_stages=1)
        for w, c, n, warps in shapes
    ]
    apart_first = outputs > (64 if size == 4 else 128)
    return [APART, *fused] if apart_first else [*fused, APART]


def _project(hidden, depthwise_weight, weight, residual=None, depthwise_bias=None, bias=None, gate=None):
    """residual + gate * PW(DW(hidden)), both with biases."""
    batch, channels, height, width = hidden.shape
    outputs, size = weight.shape[0], depthwise_weight.shape[-1]
    key = key_of(hidden, channels, outputs, size)
    tiles = config("leffn_project_fwd", key, _project_tiles(hidden.element_size(), outputs), hidden.device)
    if tiles == APART:
        convolved = depthwise(hidden, depthwise_weight, depthwise_bias)
        return pointwise(convolved, weight, residual=residual, bias=bias, gate=gate)
    y = empty_map(hidden, outputs)
    groups = cdiv(outputs, tiles["BLOCK_N"])
    values = hidden.numel() + weight.numel() + y.numel() + (0 if residual is None else y.numel())
    launch(
        leffn_project_fwd_kernel, (batch * tiles_of(height, width, tiles["BLOCK_W"]) * groups,),
        hidden, taps_of(depthwise_weight, depthwise_bias), weight, bias, gate, residual, y, height, width,
        M=channels, N=outputs, K=size, BIAS=depthwise_bias is not None, EACH_IMAGE=is_each_image(gate),
        PRECISION=precision(hidden), **tiles,
        work=Work(
            values * hidden.element_size(), matrix=2 * channels * y.numel(),
            vector=2 * size * size * hidden.numel() * groups,
        ),
    )  # fmt: skip
    return y


@functools.cache
def _hidden_tiles(size, channels, hidden):
    if size == 4:
        shapes = [(16, 32, 16, 4, 96), (16, 32, 32, 4, 128), (32, 32, 16, 8, 160), (16, 64, 16, 4, 168)]
    else:
        shapes = [(32, 32, 64, 4, 255), (32, 64, 64, 8, 255), (16, 64, 64, 4, 255), (64, 32, 64, 8, 255)]
        shapes += [(16, 32, 64, 4, 168), (32, 32, 64, 8, 168)]
    return [
        # Without a limit of its own the compiler may spill a few values to fit one more block on a multiprocessor.
        dict(
            BLOCK_W=w, BLOCK_C=side_of(hidden, (c, c // 2)), BLOCK_K=min(k, block_of(channels)), num_warps=n, maxnreg=r
        )
        for w, c, k, n, r in shapes
    ]


def _hidden_backward(grad, depthwise_weight, x, weight, bias=None):
    """The gradient before GELU, from that of the convolved map."""
    batch, hidden, height, width = grad.shape
    channels, size = x.shape[1], depthwise_weight.shape[-1]
    grad_u = empty_map(grad, hidden)
    key = key_of(x, channels, hidden, size)
    tiles = config("leffn_hidden_bwd", key, _hidden_tiles(x.element_size(), channels, hidden), x.device)
    launch(
        leffn_hidden_bwd_kernel,
        (batch * tiles_of(height, width, tiles["BLOCK_W"]) * cdiv(hidden, tiles["BLOCK_C"]),),
        grad, taps_of(depthwise_weight), x, weight, bias, grad_u, height, width,
        C=channels, M=hidden, K=size, PRECISION=precision(x), **tiles,
        work=Work(
            (x.numel() + 2 * grad.numel()) * x.element_size(), matrix=2 * channels * grad.numel(),
            vector=(2 * size * size + 40) * grad.numel(),
        ),
    )  # fmt: skip
    return grad_u


def leffn(x, expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias):
    hidden = pointwise(x, expand_weight, gelu=True, bias=expand_bias)
    return _project(hidden, depthwise_weight, project_weight, depthwise_bias=depthwise_bias, bias=project_bias)


def _backward(
    grad, x, expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias, gate=None
):
    """The gradient before GELU, as a matrix of pixels, and those of the weights, the biases and the gate."""
    hidden = pointwise(x, expand_weight, gelu=True, bias=expand_bias)
    convolved = depthwise(hidden, depthwise_weight, depthwise_bias)
    grad_branch, grad_project, *grads_end = projection_gradients(grad, convolved, project_weight, project_bias, gate)
    del convolved
    grad_convolved = map_of(matmul(grad_branch, project_weight.flatten(1)), x)
    grad_depthwise = depthwise_weight_gradient(grad_convolved, hidden, depthwise_weight.shape[-1])
    grad_depthwise_bias = bias_gradient(grad_convolved, depthwise_bias)
    del hidden
    grad_u = pixels_of(_hidden_backward(grad_convolved, depthwise_weight, x, expand_weight, expand_bias))
    return grad_u, (
        matmul(grad_u.t(), pixels_of(x)).view_as(expand_weight),
        grad_depthwise.to(depthwise_weight.dtype),
        grad_project,
        bias_gradient(grad_u, expand_bias),
        grad_depthwise_bias,
        *grads_end,
    )


def leffn_backward(grad, x, expand_weight, *others):
    grad_u, (*grads, _) = _backward(grad, x, expand_weight, *others)
    return map_of(matmul(grad_u, expand_weight.flatten(1)), x), *grads


def leffn_layer(
    x, norm_weight, norm_bias, expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias,
    project_bias, gate, eps, centered,
):  # fmt: skip
    hidden = pointwise(x, expand_weight, norm_weight, norm_bias, eps, centered, gelu=True, bias=expand_bias)
    return _project(hidden, depthwise_weight, project_weight, x, depthwise_bias, project_bias, gate)


def leffn_layer_backward(grad, x, norm_weight, norm_bias, expand_weight, *others):
    *others, eps, centered = others
    norm = norm_weight, norm_bias, eps, centered
    grad_u, grads = _backward(grad, layer_norm_2d(x, *norm), expand_weight, *others)
    return *pointwise_norm_backward(grad_u, expand_weight, x, *norm, residual=grad), *grads
