"""Layers of the IPT body: attention over tokens and feed-forward networks, pre-norm (IPT, eq. 1 and 2)."""

import torch
import torch.nn.functional as F
from torch import nn


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V of heads of d channels, without biases; parameters named as nn.MultiheadAttention's.

    Args:
        dim: channels D.
        num_heads: heads; divides D.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        nn.init.kaiming_uniform_(self.in_proj_weight, a=5**0.5)

    def forward(self, query, key, value):
        """(B, N, D), (B, M, D), (B, M, D) -> (B, N, D). Equal arguments are projected in one product."""
        dim = query.shape[2]
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight).chunk(3, dim=2)
        elif query is key:
            q, k = F.linear(query, self.in_proj_weight[: 2 * dim]).chunk(2, dim=2)
            v = F.linear(value, self.in_proj_weight[2 * dim :])
        else:
            q = F.linear(query, self.in_proj_weight[:dim])
            if key is value:
                k, v = F.linear(key, self.in_proj_weight[dim:]).chunk(2, dim=2)
            else:
                k, v = (F.linear(x, w) for x, w in zip((key, value), self.in_proj_weight[dim:].chunk(2), strict=True))
        # (B, N, D) -> (B, heads, N, d), as views
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """What encoder and decoder layers share: norms and the feed-forward network D -> ratio D -> D with ReLU."""

    def __init__(self, dim, num_heads, ratio=4, norm=True, norms=2):
        super().__init__()
        self.self_attn = MultiHeadAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, ratio * dim)
        self.linear2 = nn.Linear(ratio * dim, dim)
        for i in range(norms):
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim) if norm else nn.Identity())

    def feed_forward(self, x):
        return self.linear2(F.relu(self.linear1(x)))


class EncoderLayer(TransformerLayer):
    """z = x + MSA(y + p, y + p, y) with y = LN(x); z + FFN(LN(z)) (eq. 1; p only where positions are added every time).

    Shape: (B, N, D) -> (B, N, D); positions (N, D) or None.
    """

    def forward(self, x, positions=None):
        y = self.norm1(x)
        q = y if positions is None else y + positions
        x = x + self.self_attn(q, q, y)
        return x + self.feed_forward(self.norm2(x))


class DecoderLayer(TransformerLayer):
    """Self-attention, attention to the encoder's output, feed-forward (eq. 2).

    The task's embedding is added to q and k of the first attention and to q of the second, never to values. The memory
    enters as it is: the paper writes LN(z0), but the published weights were trained without that norm.

    Shape: (B, N, D), memory (B, N, D) -> (B, N, D); task and positions (N, D) or None.
    """

    def __init__(self, dim, num_heads, ratio=4, norm=True):
        super().__init__(dim, num_heads, ratio, norm, norms=3)
        self.multihead_attn = MultiHeadAttention(dim, num_heads)

    def forward(self, x, memory, task=None, positions=None):
        y = self.norm1(x)
        q = y if task is None else y + task
        x = x + self.self_attn(q, q, y)
        y = self.norm2(x)
        q = y if task is None else y + task
        key = memory if positions is None else memory + positions
        x = x + self.multihead_attn(q, key, memory)
        return x + self.feed_forward(self.norm3(x))
