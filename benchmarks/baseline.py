"""Plain PyTorch, the rival: the same formulas with every intermediate in the tested dtype."""

import contextlib
import functools

import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F

from ipt_fast import ops, reference
from ipt_fast.modules import convolution
from ipt_fast.reference._gate import gated_residual
from ipt_fast.reference._windows import pad_to_multiple
from ipt_fast.reference.grid_attention import lattice, relative_position_index


def formula(name):
    """The undecorated formula of an operator: called with all tensors in one dtype it never leaves that dtype."""
    return getattr(reference, name).formula


@contextlib.contextmanager
def plain_eager(**overrides):
    """Inside, the modules of ipt_fast run on plain PyTorch; ``overrides`` replace the formulas of some operators."""
    saved = {name: getattr(ops, name) for name in ops.__all__}
    emulated, convolution.EMULATED = convolution.EMULATED, frozenset()
    try:
        for name in saved:
            setattr(ops, name, overrides.get(name, formula(name)))
        yield
    finally:
        convolution.EMULATED = emulated
        for name, operator in saved.items():
            setattr(ops, name, operator)


@contextlib.contextmanager
def plain_ipt():
    """Inside, the layers of IPT are PyTorch's operations as they are written; attention is SDPA, as in ipt_fast."""
    names = "norm_projection", "add_norm_projection", "add_norm_feed_forward"
    saved = {name: getattr(ops, name) for name in names}
    try:
        for name in names:
            setattr(ops, name, formula(name))
        yield
    finally:
        for name, operator in saved.items():
            setattr(ops, name, operator)


def native_layer_norm(x, weight, bias=None, *, eps=1e-5, centered=True):
    """The centred norm by PyTorch's own kernel, which works on the last axis; parameters of each image follow it."""
    if not centered:
        return formula("layer_norm_2d")(x, weight, bias, eps=eps, centered=False)
    rows = x.permute(0, 2, 3, 1)
    if weight.dim() == 1:
        return F.layer_norm(rows, weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
    y = F.layer_norm(rows, weight.shape[1:], eps=eps) * weight[:, None, None]
    return (y if bias is None else y + bias[:, None, None]).permute(0, 3, 1, 2)


def _grid_attention(core, qkv, num_heads, grid_size):
    """Grid attention with ``core(q, k, v, padding)`` on (groups, heads, tokens, depth)."""
    batch, packed, height, width = qkv.shape
    qkv = pad_to_multiple(qkv, grid_size, grid_size)
    rows, columns = qkv.shape[2:]
    q, k, v = (lattice(t, num_heads, grid_size).flatten(0, 2) for t in qkv.chunk(3, dim=1))
    padding = None
    if (rows, columns) != (height, width):
        inside = pad_to_multiple(qkv.new_ones(batch, 1, height, width), grid_size, grid_size)
        padding = lattice(inside, 1, grid_size).flatten(0, 2).transpose(-2, -1).log()  # 0, or -inf on padded keys
    out = core(q, k, v, padding)
    cubby = (rows // grid_size, columns // grid_size)
    out = out.reshape(batch, *cubby, num_heads, grid_size, grid_size, -1).permute(0, 3, 6, 4, 1, 5, 2)
    return out.reshape(batch, packed // 3, rows, columns)[..., :height, :width]


def sdpa_grid_attention(qkv, bias_table=None, *, num_heads, grid_size):
    """Grid attention with the core by scaled_dot_product_attention."""

    def core(q, k, v, padding):
        mask = padding
        if bias_table is not None:
            bias = bias_table[relative_position_index(grid_size, qkv.device)].permute(2, 0, 1)[None]
            mask = bias if padding is None else bias + padding
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _grid_attention(core, qkv, num_heads, grid_size)


@functools.cache
def _flex_attention():
    return torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=False)


def flex_grid_attention(qkv, bias_table=None, *, num_heads, grid_size):
    """Grid attention with the core by FlexAttention, compiled; whole lattices only."""
    index = relative_position_index(grid_size, qkv.device)

    def with_bias(score, group, head, query, key):
        return score if bias_table is None else score + bias_table[index[query, key], head]

    def core(q, k, v, padding):
        if padding is not None:
            raise ValueError(f"the lattice must be whole; {qkv.shape[2]}x{qkv.shape[3]} is not")
        return _flex_attention()(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=with_bias)

    return _grid_attention(core, qkv, num_heads, grid_size)


def sdpa_grid_layer(
    x,
    norm_weight,
    norm_bias,
    qkv_weight,
    project_weight,
    bias_table=None,
    *,
    qkv_bias=None,
    project_bias=None,
    gate=None,
    eps=1e-5,
    centered=True,
    **options,
):
    """The grid attention layer with the core by scaled_dot_product_attention and PyTorch's own norm."""
    y = native_layer_norm(x, norm_weight, norm_bias, eps=eps, centered=centered)
    y = sdpa_grid_attention(F.conv2d(y, qkv_weight, qkv_bias), bias_table, **options)
    return gated_residual(x, F.conv2d(y, project_weight, project_bias), gate)


def native_focal_layer(
    x,
    norm_weight,
    norm_bias,
    qkv_weight,
    depthwise_weight,
    project_weight,
    temperature,
    token_weight,
    top_weight,
    bottom_weight,
    *,
    qkv_bias=None,
    depthwise_bias=None,
    project_bias=None,
    gate=None,
    eps=1e-5,
    centered=True,
    **options,
):
    """The focal attention layer with PyTorch's own norm."""
    y = native_layer_norm(x, norm_weight, norm_bias, eps=eps, centered=centered)
    qkv = F.conv2d(y, qkv_weight, qkv_bias)
    qkv = F.conv2d(qkv, depthwise_weight, depthwise_bias, padding=1, groups=len(depthwise_weight))
    focal = (temperature, token_weight, top_weight, bottom_weight)
    y = formula("focal_channel_attention")(qkv, *focal, **options)
    return gated_residual(x, F.conv2d(y, project_weight, project_bias), gate)


def native_leffn_layer(
    x,
    norm_weight,
    norm_bias,
    expand_weight,
    depthwise_weight,
    project_weight,
    *,
    gate=None,
    eps=1e-5,
    centered=True,
    **biases,
):
    """The feed-forward layer with PyTorch's own norm."""
    y = native_layer_norm(x, norm_weight, norm_bias, eps=eps, centered=centered)
    return gated_residual(x, formula("leffn")(y, expand_weight, depthwise_weight, project_weight, **biases), gate)


def sdpa_window_layer(
    x, norm_weight, norm_bias, qkv_weight, project_weight, bias_table, *, num_heads, window_size, shift
):
    """A layer of a Swin transformer with the core by scaled_dot_product_attention and PyTorch's own norm, shifted by
    rolling the map, with a mask; whole windows only.
    """
    batch, channels, height, width = x.shape
    y = native_layer_norm(x, norm_weight, norm_bias)
    qkv = F.conv2d(y, qkv_weight).permute(0, 2, 3, 1).roll((-shift, -shift), (1, 2))
    down, across = height // window_size, width // window_size
    qkv = qkv.reshape(batch, down, window_size, across, window_size, 3, num_heads, -1)
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)
    index = relative_position_index(window_size, x.device)
    mask = bias_table[index].permute(2, 0, 1) + _shift_mask(height, width, window_size, shift, x.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(batch, 1, 1, 1))
    out = out.unflatten(0, (batch, down, across)).unflatten(4, (window_size, window_size))
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, channels).roll((shift, shift), (1, 2))
    return x + F.conv2d(out.permute(0, 3, 1, 2), project_weight)


@functools.cache
def _shift_mask(height, width, window_size, shift, dtype):
    """(windows, 1, tokens, tokens): minus infinity between pixels that only the roll has brought together."""

    def parts(size):
        return (torch.arange(size) >= size - window_size).int() + (torch.arange(size) >= size - shift).int()

    regions = 3 * parts(height)[:, None] + parts(width)
    regions = regions.reshape(height // window_size, window_size, width // window_size, window_size)
    regions = regions.permute(0, 2, 1, 3).reshape(-1, 1, window_size**2)
    return torch.where(regions[..., None] == regions[:, :, None], 0.0, float("-inf")).to(dtype)
