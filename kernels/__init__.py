"""Triton kernels: one file for each operator, functions with the operator's name and arguments.

Images come channels-last, so a map is a matrix of pixels by channels; all other tensors come contiguous. Products and
statistics are in fp32. Gradients are summed in a fixed order, never by atomic additions. Needs Triton; nothing in
ipt_fast imports this package before a kernel is asked for.
"""

from .layer_norm_2d import layer_norm_2d, layer_norm_2d_backward

__all__ = ["layer_norm_2d", "layer_norm_2d_backward"]
