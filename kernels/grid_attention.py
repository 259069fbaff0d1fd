"""Attention on dilated lattices over the whole image: see ipt_fast.ops.grid_attention and _attention.py."""

import torch

from ._attention import attention
from ._attention_backward import attention_backward
from ._lattice import grid_lattice
from ._windows import parts_of


def grid_attention(qkv, bias_table, num_heads, grid_size):
    lattice = grid_lattice(qkv, qkv.shape[1] // 3, num_heads, grid_size)
    return attention(lattice, *parts_of(qkv), bias_table, None, lattice.depth**-0.5)


def grid_attention_backward(grad, qkv, bias_table, num_heads, grid_size):
    lattice, grad_qkv = grid_lattice(qkv, qkv.shape[1] // 3, num_heads, grid_size), torch.empty_like(qkv)
    of_scores = bias_table, None, lattice.depth**-0.5
    grad_table, _ = attention_backward(lattice, grad, *parts_of(qkv), *of_scores, [grad_qkv] * 3)
    return grad_qkv, grad_table
