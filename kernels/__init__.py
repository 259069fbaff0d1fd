"""Triton kernels: one file for each operator, functions with the operator's name and arguments.

Images come channels-last, so a map is a matrix of pixels by channels; all other tensors come contiguous. Products and
statistics are in fp32. Gradients are summed in a fixed order, never by atomic additions. Needs Triton; nothing in
ipt_fast imports this package before a kernel is asked for.
"""

from .channel_attention import channel_attention, channel_attention_backward
from .channel_attention_layer import channel_attention_layer, channel_attention_layer_backward
from .depthwise_layer import depthwise_layer, depthwise_layer_backward
from .feed_forward_layer import feed_forward_layer, feed_forward_layer_backward
from .focal_attention_layer import focal_attention_layer, focal_attention_layer_backward
from .focal_channel_attention import focal_channel_attention, focal_channel_attention_backward
from .gated_projection import gated_projection, gated_projection_backward
from .grid_attention import grid_attention, grid_attention_backward
from .grid_attention_layer import grid_attention_layer, grid_attention_layer_backward
from .layer_norm_2d import add_layer_norm, add_layer_norm_backward, layer_norm_2d, layer_norm_2d_backward
from .leffn import leffn, leffn_backward, leffn_layer, leffn_layer_backward
from .merge import merge_depthwise, merge_depthwise_backward, merge_pointwise, merge_pointwise_backward
from .pointwise_layer import pointwise_layer, pointwise_layer_backward
from .window_attention import window_attention, window_attention_backward
from .window_attention_layer import window_attention_layer, window_attention_layer_backward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "channel_attention",
    "channel_attention_backward",
    "channel_attention_layer",
    "channel_attention_layer_backward",
    "depthwise_layer",
    "depthwise_layer_backward",
    "feed_forward_layer",
    "feed_forward_layer_backward",
    "focal_attention_layer",
    "focal_attention_layer_backward",
    "focal_channel_attention",
    "focal_channel_attention_backward",
    "gated_projection",
    "gated_projection_backward",
    "grid_attention",
    "grid_attention_backward",
    "grid_attention_layer",
    "grid_attention_layer_backward",
    "layer_norm_2d",
    "layer_norm_2d_backward",
    "leffn",
    "leffn_backward",
    "leffn_layer",
    "leffn_layer_backward",
    "merge_depthwise",
    "merge_depthwise_backward",
    "merge_pointwise",
    "merge_pointwise_backward",
    "pointwise_layer",
    "pointwise_layer_backward",
    "window_attention",
    "window_attention_backward",
    "window_attention_layer",
    "window_attention_layer_backward",
]
