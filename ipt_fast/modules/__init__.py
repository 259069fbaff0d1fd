"""Drop-in modules: attentions and feed-forward networks of IPT-V2 and Restormer, layer normalisation over channels."""

from .attention import FocalContextSelfAttention, GlobalGridSelfAttention
from .feed_forward import RepLeFFN
from .gated_feed_forward import GatedFeedForward
from .normalization import LayerNorm2d
from .transposed_attention import TransposedAttention

__all__ = [
    "FocalContextSelfAttention",
    "GatedFeedForward",
    "GlobalGridSelfAttention",
    "LayerNorm2d",
    "RepLeFFN",
    "TransposedAttention",
]
