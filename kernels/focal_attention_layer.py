"""x + gate * project(attention(depthwise(qkv(norm(x))))); see ipt_fast.ops.focal_attention_layer.

The norm is part of the first projection. The depthwise convolution is a pass of its own, or FUSED, computed where q, k
and v are read: in the pass that makes Gram matrices, and in the one that applies the attention to v. Up to MOST bytes a
pixel this one takes all heads of its tokens, the projection and the residual, too. FUSED this makes 9 C values a pixel
(read x, write and read 3 C, read x, write), else 15 C. Above, the result is written, and the projection adds the
residual: 2 C more. Biases and the gate come with the convolution or projection that they follow.

Backward: everything is made again, then each part's own backward runs.
"""

import torch
import triton
import triton.language as tl

from ._attend import apply, attend
from ._dot import dot
from ._gram import gram, of_branches
from ._images import is_each_image, of_image
from ._launch import Work, block_of, config, key_of, launch, matmul, precision
from ._windows import (
    SIZES,
    block_of_program,
    block_position,
    is_inside,
    load_tokens,
    load_weights,
    matrix_of,
    parts_of,
    tile_of,
    tile_range,
    token_offsets,
)
from .depthwise import depthwise, depthwise_weight_gradient, rows_of, taps_of
from .focal_channel_attention import attention_and_slots, focal_channel_attention_backward, groups_of
from .layer_norm_2d import layer_norm_2d
from .pointwise import gated_residual, map_of, pixels_of, plus_bias, pointwise
from .pointwise_backward import pointwise_norm_backward
from .projection_backward import bias_gradient, projection_gradients

MOST = 256  # bytes of a pixel of x


@triton.jit(do_not_specialize=SIZES)
def focal_attention_layer_fwd_kernel(
    qkv, taps, attention, top_weight, bottom_weight, project_weight, project_bias, gate, x, out,
    height, width, windows_y, windows_x, blocks_y, blocks_x, splits,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, BRANCHES: tl.constexpr,
    CYCLIC: tl.constexpr, EACH_IMAGE: tl.constexpr, DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # b_v, b_y: (tile, BLOCK_D); b_a: (BLOCK_D of y, BLOCK_D of v); b_w: (BLOCK_C, BLOCK_D); b_o: (tile, BLOCK_C); gate:
    # of each image, if EACH_IMAGE
    C: tl.constexpr = HEADS * DEPTH
    tl.static_assert(TILE_Y == 4 or not DEPTHWISE, "rows are convolved by fours")
    i_program = tl.program_id(0)
    _, i_split, i_image, i_y, i_x, y0, y1, x0, x1 = block_of_program(
        i_program, height, width, blocks_y, blocks_x, splits, 1, P, SHIFT
    )
    if EACH_IMAGE:
        gate = of_image(gate, i_image, 1, C)
    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    m_c, m_d = o_c < C, o_d < DEPTH
    m_a = m_d[:, None] & m_d[None, :]
    i_top = matrix_of(i_image, i_y, i_x, 0, windows_y, windows_x, 0, BRANCHES, HEADS, SHIFT)
    i_bottom = matrix_of(i_image, i_y, i_x, 0, windows_y, windows_x, 1, BRANCHES, HEADS, SHIFT)
    p_a = attention + o_d[:, None] * DEPTH + o_d[None, :]
    first, last = tile_range(i_split, splits, y0, x0, y1, x1, TILE_Y, TILE_X)
    for i_tile in range(first, last):
        i_ty, i_tx, o_y, o_x, m_t = tile_of(i_tile, y0, x0, y1, x1, TILE_Y, TILE_X)
        o_wy = block_position(i_y, 0, P, SHIFT) + i_ty - y0 + o_y
        o_wx = block_position(i_x, 0, P, SHIFT) + i_tx - x0 + o_x
        b_o = tl.zeros((TILE_Y * TILE_X, BLOCK_C), dtype=tl.float32)
        for i_head in range(HEADS):
            o_v = 2 * C + i_head * DEPTH + o_d
            b_v = load_tokens(qkv, taps, i_image, i_ty, i_tx, o_y, o_x, m_t, o_v, m_d, height, width, 3 * C, DEPTHWISE)
            b_a = tl.load(p_a + (i_top + i_head * BRANCHES) * DEPTH * DEPTH, mask=m_a, other=0.0)
            b_top = dot(b_v, tl.trans(b_a), None, PRECISION)
            b_y = b_top * load_weights(top_weight, i_head, o_wy, o_wx, m_t, P)[:, None]
            b_a = tl.load(p_a + (i_bottom + i_head * BRANCHES) * DEPTH * DEPTH, mask=m_a, other=0.0)
            b_b = dot(b_v, tl.trans(b_a), None, PRECISION)
            b_y += b_b * load_weights(bottom_weight, i_head, o_wy, o_wx, m_t, P)[:, None]
            if not CYCLIC:
                b_y = tl.where(is_inside(i_y, i_x, height, width, P), b_y, b_top)
            p_w = project_weight + o_c[:, None] * C + i_head * DEPTH + o_d[None, :]
            b_w = tl.load(p_w, mask=m_c[:, None] & m_d[None, :], other=0.0)
            b_o = dot(b_y.to(x.dtype.element_ty), tl.trans(b_w), b_o, PRECISION)
        p_x = token_offsets(i_image, i_ty, i_tx, o_y, o_x, o_c, height, width, C)
        m_x = m_t[:, None] & m_c[None, :]
        b_o = gated_residual(plus_bias(b_o, project_bias, o_c, m_c), gate, x, p_x, o_c, m_c, m_x)
        tl.store(out + p_x, b_o.to(out.dtype.element_ty), mask=m_x)


def _apply_and_project(groups, qkv, taps, attention, weights, project_weight, project_bias, gate, x):
    out = torch.empty_like(x)
    windows_y, windows_x, blocks_y, blocks_x = groups.windows_and_blocks
    if x.element_size() == 4:
        shapes = [(16, 8, 2 if taps is None else 1), (32, 8, 1), (16, 4, 1)]
    elif taps is None:
        shapes = [(64, 4, 2), (64, 8, 2), (128, 8, 2), (64, 4, 1), (32, 4, 2), (16, 8, 2)]
    else:
        shapes = [(64, 8, 1), (64, 4, 1), (32, 8, 1), (32, 4, 1)]
    rows = None if taps is None else 4
    candidates = [groups.tiles(*shape, rows) | dict(BLOCK_C=block_of(groups.channels)) for shape in shapes]
    key = key_of(x, groups.channels, groups.depth, groups.label, *(["depthwise"] if taps is not None else []))
    tiles = config("focal_attention_layer_fwd", key, candidates, x.device)
    splits = groups.splits_for(tiles, groups.blocks)
    launch(
        focal_attention_layer_fwd_kernel, (groups.blocks * splits,),
        qkv, taps, attention, *weights, project_weight, project_bias, gate, x, out,
        groups.height, groups.width, windows_y, windows_x, blocks_y, blocks_x, splits,
        **groups.constants, CYCLIC=groups.cyclic, EACH_IMAGE=is_each_image(gate), DEPTHWISE=rows_of(taps),
        PRECISION=precision(x), **tiles,
        work=Work(
            (3 * x.numel() + attention.numel() + project_weight.numel()) * x.element_size(),
            matrix=2 * x.numel() * (2 * groups.depth + groups.channels), vector=0 if taps is None else 18 * x.numel(),
        ),
    )  # fmt: skip
    return out


def focal_attention_layer(
    x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight, temperature, token_weight, top_weight,
    bottom_weight, qkv_bias, depthwise_bias, project_bias, gate, num_heads, window_size, eps, centered, cyclic,
):  # fmt: skip
    qkv = pointwise(x, qkv_weight, norm_weight, norm_bias, eps, centered, bias=qkv_bias)
    groups = groups_of(qkv, num_heads, window_size, cyclic)
    key = key_of(x, groups.channels, groups.depth, groups.label)
    schedule = config("focal_attention_layer", key, [dict(FUSED=False), dict(FUSED=True)], x.device)
    taps = None
    if schedule["FUSED"]:
        taps = taps_of(depthwise_weight, depthwise_bias)
    else:
        qkv = depthwise(qkv, depthwise_weight, depthwise_bias)
    q, k, v = parts_of(qkv)
    slots = gram(groups, q, k, of_branches(token_weight), depthwise=taps)
    attention = attend(groups, slots, temperature, True, x.dtype)
    merge = top_weight, bottom_weight
    if groups.channels * x.element_size() <= MOST:
        return _apply_and_project(groups, qkv, taps, attention, merge, project_weight, project_bias, gate, x)
    attended = torch.empty_like(x)
    apply(groups, v, attention, merge, attended, taps)
    return pointwise(attended, project_weight, residual=x, bias=project_bias, gate=gate)


def focal_attention_layer_backward(
    grad, x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight, temperature, token_weight,
    top_weight, bottom_weight, qkv_bias, depthwise_bias, project_bias, gate, num_heads, window_size, eps, centered,
    cyclic,
):  # fmt: skip
    attention = temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic
    normal = layer_norm_2d(x, norm_weight, norm_bias, eps, centered)
    projected = pointwise(normal, qkv_weight, bias=qkv_bias)
    qkv = depthwise(projected, depthwise_weight, depthwise_bias)
    attended, slots = attention_and_slots(qkv, *attention)
    grad_branch, grad_project, *grads_end = projection_gradients(grad, attended, project_weight, project_bias, gate)
    del attended
    grad_attended = map_of(matmul(grad_branch, project_weight.flatten(1)), x)
    del grad_branch
    grad_qkv, *grads_attention = focal_channel_attention_backward(grad_attended, qkv, *attention, slots)
    del qkv, grad_attended
    grad_depthwise = depthwise_weight_gradient(grad_qkv, projected, 3)
    grad_depthwise_bias = bias_gradient(grad_qkv, depthwise_bias)
    del projected
    grad_projected = depthwise(grad_qkv, depthwise_weight, flip=True)
    grad_to_qkv = matmul(pixels_of(grad_projected).t(), pixels_of(normal))
    norm = norm_weight, norm_bias, eps, centered
    grad_x, *grads_norm = pointwise_norm_backward(grad_projected, qkv_weight, x, *norm, residual=grad)
    return (
        grad_x,
        *grads_norm,
        grad_to_qkv.view_as(qkv_weight),
        grad_depthwise.to(depthwise_weight.dtype),
        grad_project,
        *grads_attention,
        bias_gradient(grad_projected, qkv_bias),
        grad_depthwise_bias,
        *grads_end,
    )
