"""Channel attention in windows and shifted windows: see ipt_fast.ops.focal_channel_attention and _attend.py."""

import torch

from ._attend import apply, attend
from ._gram import gram, of_branches
from ._gram_backward import gradients
from ._windows import Channels, Groups, parts_of
from .pointwise import empty_map


def groups_of(qkv, num_heads, window_size, cyclic):
    batch, packed, height, width = qkv.shape
    return Groups(batch, height, width, num_heads, packed // 3 // num_heads, (window_size,) * 2, 2, cyclic)


def focal_channel_attention(qkv, *arguments):
    out, _ = attention_and_slots(qkv, *arguments)
    return out


def attention_and_slots(qkv, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic):
    """The result, and the Gram matrices, of which the backward has use."""
    groups = groups_of(qkv, num_heads, window_size, cyclic)
    q, k, v = parts_of(qkv)
    slots = gram(groups, q, k, of_branches(token_weight))
    attention = attend(groups, slots, temperature, True, qkv.dtype)
    out = empty_map(qkv, groups.channels)
    apply(groups, v, attention, (top_weight, bottom_weight), out)
    return out, slots


def focal_channel_attention_backward(
    grad, qkv, temperature, token_weight, top_weight, bottom_weight, num_heads, window_size, cyclic, slots=None
):
    groups = groups_of(qkv, num_heads, window_size, cyclic)
    grad_qkv = torch.empty_like(qkv)
    weights = token_weight, top_weight, bottom_weight
    grad_temperature, grad_weights = gradients(
        groups, Channels(grad), *parts_of(qkv), [grad_qkv] * 3, temperature, True, weights, slots
    )
    grad_weights = [g.to(weight.dtype) for g, weight in zip(grad_weights, weights, strict=True)]
    return grad_qkv, grad_temperature.to(temperature.dtype), *grad_weights
