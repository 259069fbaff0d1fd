"""Attention in windows: see ipt_fast.ops.window_attention and _attention.py."""

import torch

from ._attention import attention
from ._attention_backward import attention_backward
from ._attention_sums import sum_of_windows
from ._lattice import window_lattice
from ._windows import Channels
from .pointwise import empty_map


def window_attention(q, k, v, bias, temperature, num_heads, window_size, key_size, shift, scale):
    lattice = window_lattice(q, k, bias, q.shape[1], num_heads, window_size, key_size, shift)
    return attention(lattice, *map(Channels, (q, k, v)), bias, temperature, scale)


def window_attention_backward(grad, q, k, v, bias, temperature, num_heads, window_size, key_size, shift, scale):
    lattice = window_lattice(q, k, bias, q.shape[1], num_heads, window_size, key_size, shift)
    grads = written = [empty_map(x, x.shape[1]) for x in (q, k, v)]
    if lattice.overlapping:
        shape = lattice.groups, lattice.key_tokens, lattice.channels
        written = [grads[0], *(torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))]
    of_scores = attention_backward(lattice, grad, *map(Channels, (q, k, v)), bias, temperature, scale, written)
    if lattice.overlapping:
        for parts, found in zip(written[1:], grads[1:], strict=True):
            sum_of_windows(lattice, parts, found)
    return *grads, *of_scores
