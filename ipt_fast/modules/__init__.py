"""Drop-in modules: the attentions and the feed-forward network of IPT-V2, and layer normalisation over channels."""

from .attention import FocalContextSelfAttention, GlobalGridSelfAttention
from .feed_forward import RepLeFFN
from .normalization import LayerNorm2d

__all__ = ["FocalContextSelfAttention", "GlobalGridSelfAttention", "LayerNorm2d", "RepLeFFN"]
