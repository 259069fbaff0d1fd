"""Half a layer with attention on dilated lattices: see ipt_fast.ops.grid_attention_layer and _attention_layer.py."""

from ._attention_layer import attention_layer, attention_layer_backward
from ._lattice import grid_lattice


def grid_attention_layer(x, *arguments):
    *tensors, num_heads, grid_size, eps, centered = arguments
    lattice = grid_lattice(x, x.shape[1], num_heads, grid_size)
    return attention_layer(lattice, x, *tensors, lattice.depth**-0.5, eps, centered)


def grid_attention_layer_backward(grad, x, *arguments):
    *tensors, num_heads, grid_size, eps, centered = arguments
    lattice = grid_lattice(x, x.shape[1], num_heads, grid_size)
    return attention_layer_backward(lattice, grad, x, *tensors, lattice.depth**-0.5, eps, centered)
