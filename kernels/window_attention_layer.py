"""Half a layer of a Swin transformer: see ipt_fast.ops.window_attention_layer and _attention_layer.py."""

from ._attention_layer import attention_layer, attention_layer_backward
from ._lattice import window_lattice


def _lattice_and_others(x, arguments):
    *tensors, num_heads, window, shift, scale, eps, centered, residual = arguments
    lattice = window_lattice(x, x, tensors[4], x.shape[1], num_heads, window, window, shift)
    return lattice, *tensors, scale, eps, centered, residual


def window_attention_layer(x, *arguments):
    lattice, *others = _lattice_and_others(x, arguments)
    return attention_layer(lattice, x, *others)


def window_attention_layer_backward(grad, x, *arguments):
    lattice, *others = _lattice_and_others(x, arguments)
    return attention_layer_backward(lattice, grad, x, *others)
