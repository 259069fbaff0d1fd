"""x + gate * project(attention(qkv(norm(x)))) in groups: what the layers of grid and of window attention share.

Small groups and widths (`fits_one_kernel`): one program makes one group from x to the output, so that a pixel's 2 C
values are all the memory traffic, and 8 C² + 4 tokens C FLOP a pixel run on what the chip holds. Otherwise the norm is
part of the first projection, gate and residual of the second, with the attention between: 12 C values.

Backward: normalised pixels and projections are made again, then each part's own backward runs.
"""

import torch
import triton
import triton.language as tl

from ._attention import attention
from ._attention_backward import attention_backward
from ._dot import dot
from ._images import alike, is_each_image, of_image
from ._lattice import SIZES, biases, finite_shift, group_pixels, key_rows, masked_scores, query_rows
from ._launch import Work, block_of, config, launch, matmul
from ._windows import parts_of
from .layer_norm_2d import layer_norm_2d
from .pointwise import gated_residual, map_of, pixels_of, plus_bias, pointwise
from .pointwise_backward import pointwise_norm_backward
from .projection_backward import bias_gradient, projection_gradients


@triton.jit(do_not_specialize=SIZES)
def attention_layer_fwd_kernel(
    x, norm_weight, norm_bias, qkv_weight, project_weight, bias, qkv_bias, project_bias, gate, residual, out,
    height, width, down, across, scale, eps,
    CENTERED: tl.constexpr, NORM_EACH_IMAGE: tl.constexpr, GATE_EACH_IMAGE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, LATTICE: tl.constexpr, TABLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # b_x, b_y, b_out: (BLOCK_T, BLOCK_C); b_q, b_k, b_v, b_a: (BLOCK_T, BLOCK_D); b_s, b_p: (BLOCK_T, BLOCK_T)
    C: tl.constexpr = HEADS * D
    DTYPE: tl.constexpr = x.dtype.element_ty
    i_group = tl.program_id(0)
    if NORM_EACH_IMAGE:
        norm_weight = of_image(norm_weight, i_group // across // down, 1, C)
        if norm_bias is not None:
            norm_bias = of_image(norm_bias, i_group // across // down, 1, C)
    if GATE_EACH_IMAGE:
        gate = of_image(gate, i_group // across // down, 1, C)
    o_t = tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    m_c = o_c < C
    m_w = (o_d < D)[:, None] & m_c[None, :]
    o_pixel, m_t = group_pixels(i_group, o_t, height, width, down, across, LATTICE)
    o_x = o_pixel[:, None] * C + o_c[None, :]
    m_x = m_t[:, None] & m_c[None, :]
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, axis=1) / C
    b_y = tl.where(m_c[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_y * b_y, axis=1) / C + eps)
    if not CENTERED:
        b_y = b_x
    b_y *= b_rstd[:, None] * tl.load(norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if norm_bias is not None:
        b_y += tl.load(norm_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_y = b_y.to(DTYPE)
    o_bias = query_rows(o_t, LATTICE, LATTICE, TABLE)[:, None] - key_rows(o_t, LATTICE, TABLE)[None, :]
    b_out = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    for i_head in tl.range(0, HEADS, disable_licm=True):
        p_w = qkv_weight + (i_head * D + o_d)[:, None] * C + o_c[None, :]
        o_h = i_head * D + o_d
        m_h = o_d < D
        b_v = dot(b_y, tl.trans(tl.load(p_w + 2 * C * C, mask=m_w, other=0.0)), None, PRECISION)
        b_v = plus_bias(b_v, qkv_bias, 2 * C + o_h, m_h).to(DTYPE)
        b_q = dot(b_y, tl.trans(tl.load(p_w, mask=m_w, other=0.0)), None, PRECISION)
        b_q = plus_bias(b_q, qkv_bias, o_h, m_h).to(DTYPE)
        b_k = dot(b_y, tl.trans(tl.load(p_w + C * C, mask=m_w, other=0.0)), None, PRECISION)
        b_k = plus_bias(b_k, qkv_bias, C + o_h, m_h).to(DTYPE)
        b_bias = biases(bias, o_bias, i_head, HEADS, LATTICE, LATTICE, TABLE)
        b_s = masked_scores(b_q, b_k, b_bias, m_t[None, :], scale, PRECISION)
        b_p = tl.exp2(b_s - finite_shift(tl.max(b_s, axis=1))[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_a = dot(b_p.to(DTYPE), b_v, None, PRECISION) / b_sum[:, None]
        p_w = project_weight + o_c[:, None] * C + (i_head * D + o_d)[None, :]
        b_w = tl.load(p_w, mask=m_c[:, None] & (o_d < D)[None, :], other=0.0)
        b_out = dot(b_w, tl.trans(b_a.to(DTYPE)), b_out, PRECISION)
    b_out = gated_residual(plus_bias(tl.trans(b_out), project_bias, o_c, m_c), gate, residual, o_x, o_c, m_c, m_x)
    tl.store(out + o_x, b_out.to(DTYPE), mask=m_x)


def fits_one_kernel(lattice, x):
    """Whether the layer is one kernel: a group and a head's weights have to stay in registers and shared memory."""
    return lattice.tokens <= 64 and lattice.channels <= 128 and x.element_size() == 2


def _tiles(lattice):
    block = dict(BLOCK_T=block_of(lattice.tokens), BLOCK_C=block_of(lattice.channels))
    # On an H200, Triton 3.6, four warps at 64 channels read or wrote where they must not; nobody knows yet why.
    warps = (8, 16) if lattice.channels > 32 else (4, 8, 2)
    return [dict(**block, num_warps=count, num_stages=1) for count in warps]


def _in_one_kernel(
    lattice, x, norm_weight, norm_bias, qkv_weight, project_weight, bias, qkv_bias, project_bias, gate, scale, eps,
    centered, residual,
):  # fmt: skip
    out = x.new_empty(x.shape[0], *x.shape[2:], lattice.channels).permute(0, 3, 1, 2)
    key = lattice.key(x, bias) + f"-{lattice.heads}"
    tiles = config(f"{lattice.operator}_layer_fwd", key, _tiles(lattice), x.device)
    depth, width = block_of(lattice.depth), tiles["BLOCK_C"]
    rows = lattice.groups * lattice.tokens
    height, width_of_map, _, _, down, across = lattice.steps
    launch(
        attention_layer_fwd_kernel, (lattice.groups,),
        x, *alike(x.shape[0], norm_weight, norm_bias), qkv_weight, project_weight, bias, qkv_bias, project_bias, gate,
        x if residual else None, out, height, width_of_map, down, across, scale, eps,
        CENTERED=centered, NORM_EACH_IMAGE=is_each_image(norm_weight, norm_bias), GATE_EACH_IMAGE=is_each_image(gate),
        **lattice.constants_of_layer(x), **tiles,
        work=Work(
            (2 * x.numel() + 4 * lattice.channels**2) * x.element_size(),
            matrix=8 * rows * lattice.heads * width * depth + 4 * lattice.scores * depth,
            vector=8 * (x.numel() + lattice.scores),
        ),
    )  # fmt: skip
    return out


def attention_layer(
    lattice, x, norm_weight, norm_bias, qkv_weight, project_weight, bias, qkv_bias, project_bias, gate, scale, eps,
    centered, residual=True,
):  # fmt: skip
    """``bias``: of the scores; ``scale``: of them, too; ``residual``: whether x is added."""
    if fits_one_kernel(lattice, x):
        others = bias, qkv_bias, project_bias, gate, scale, eps, centered, residual
        return _in_one_kernel(lattice, x, norm_weight, norm_bias, qkv_weight, project_weight, *others)
    qkv = pointwise(x, qkv_weight, norm_weight, norm_bias, eps, centered, bias=qkv_bias)
    attended = attention(lattice, *parts_of(qkv), bias, None, scale)
    return pointwise(attended, project_weight, residual=x if residual else None, bias=project_bias, gate=gate)


def attention_layer_backward(
    lattice, grad, x, norm_weight, norm_bias, qkv_weight, project_weight, bias, qkv_bias, project_bias, gate, scale,
    eps, centered, residual=True,
):  # fmt: skip
    """Of all tensors after ``grad``, in their order."""
    normal = layer_norm_2d(x, norm_weight, norm_bias, eps, centered)
    qkv = pointwise(normal, qkv_weight, bias=qkv_bias)
    attended = attention(lattice, *parts_of(qkv), bias, None, scale)
    grad_branch, grad_project, *grads_end = projection_gradients(grad, attended, project_weight, project_bias, gate)
    grad_attended, grad_qkv = map_of(matmul(grad_branch, project_weight.flatten(1)), x), torch.empty_like(qkv)
    grad_bias, _ = attention_backward(lattice, grad_attended, *parts_of(qkv), bias, None, scale, [grad_qkv] * 3)
    grad_to_qkv = matmul(pixels_of(grad_qkv).t(), pixels_of(normal))
    norm = norm_weight, norm_bias, eps, centered
    stream = grad if residual else None
    grad_x, *grad_norm = pointwise_norm_backward(grad_qkv, qkv_weight, x, *norm, residual=stream)
    grads = grad_x, *grad_norm, grad_to_qkv.view_as(qkv_weight), grad_project, grad_bias
    return *grads, bias_gradient(grad_qkv, qkv_bias), *grads_end
