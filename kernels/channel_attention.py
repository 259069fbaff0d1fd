"""Channel attention of whole images and of windows: see ipt_fast.ops.channel_attention, _gram.py and _attend.py."""

import torch

from ._attend import apply, attend
from ._gram import gram
from ._gram_backward import gradients
from ._windows import Channels, Groups


def groups_of(x, num_heads, window_size):
    """A window that holds the whole image is the whole image."""
    batch, channels, height, width = x.shape
    if window_size is None or min(window_size) >= max(height, width):
        return Groups.whole(batch, height, width, num_heads, channels // num_heads)
    return Groups(batch, height, width, num_heads, channels // num_heads, window_size[0], 1)


def channel_attention(q, k, v, temperature, num_heads, window_size, dilation, overlapping):
    groups = groups_of(q, num_heads, window_size)
    slots = gram(groups, Channels(q), Channels(k))
    attention = attend(groups, slots, temperature, False, q.dtype)
    out = torch.empty_like(q)
    apply(groups, Channels(v), attention, (None, None), out)
    return out


def channel_attention_backward(grad, q, k, v, temperature, num_heads, window_size, dilation, overlapping):
    groups = groups_of(q, num_heads, window_size)
    grads = [torch.empty_like(q) for _ in range(3)]
    maps = [Channels(x) for x in (grad, q, k, v)]
    grad_temperature, _ = gradients(groups, *maps, grads, temperature, False)
    return *grads, grad_temperature.to(temperature.dtype)
