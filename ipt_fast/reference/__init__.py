"""Every operator in plain PyTorch, written as the papers' formulas: oracle, default backend and specification.

A reference computes in float32 (float64 for float64 input) and rounds once at the end; arguments are those of the
operator of the same name in :mod:`ipt_fast.ops`, which also checks them.
"""

from .add_norm_feed_forward import add_norm_feed_forward
from .add_norm_projection import add_norm_projection
from .channel_attention import channel_attention
from .channel_attention_layer import channel_attention_layer
from .dense_convolution import dense_convolution
from .depthwise_layer import depthwise_layer
from .feed_forward_layer import feed_forward_layer
from .focal_attention_layer import focal_attention_layer
from .focal_channel_attention import focal_channel_attention
from .gated_projection import gated_projection
from .grid_attention import grid_attention
from .grid_attention_layer import grid_attention_layer
from .layer_norm_2d import layer_norm_2d
from .leffn import leffn
from .leffn_layer import leffn_layer
from .merge_depthwise import merge_depthwise
from .merge_pointwise import merge_pointwise
from .norm_projection import norm_projection
from .pointwise_layer import pointwise_layer
from .window_attention import window_attention
from .window_attention_layer import window_attention_layer

# isort: split
# Addresses of before, which are here without an import of their own.
from . import layers as layers
from . import merge as merge

__all__ = [
    "add_norm_feed_forward",
    "add_norm_projection",
    "channel_attention",
    "channel_attention_layer",
    "dense_convolution",
    "depthwise_layer",
    "feed_forward_layer",
    "focal_attention_layer",
    "focal_channel_attention",
    "gated_projection",
    "grid_attention",
    "grid_attention_layer",
    "layer_norm_2d",
    "leffn",
    "leffn_layer",
    "merge_depthwise",
    "merge_pointwise",
    "norm_projection",
    "pointwise_layer",
    "window_attention",
    "window_attention_layer",
]
