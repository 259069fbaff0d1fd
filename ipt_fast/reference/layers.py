"""The halves of transformer layers of IPT-V2. Each has a module of its own; this one keeps their old address."""

from .focal_attention_layer import focal_attention_layer as focal_attention_layer
from .grid_attention_layer import grid_attention_layer as grid_attention_layer
from .leffn_layer import leffn_layer as leffn_layer
