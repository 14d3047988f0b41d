"""The transformer block that the language model and the vision transformer share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and beside a residual connection.

    Args:
        width: the width of the model.
        heads: the number of attention heads.
        causal: whether a position attends to earlier ones alone.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what follows x, of shape (batch, positions, width)."""
        batch, positions, width = x.shape
        parts = self.qkv(self.attention_norm(x)).view(batch, positions, 3 * self.heads, -1).transpose(1, 2)
        query, key, value = parts.chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, positions, width))
        hidden: Tensor = self.narrow(F.gelu(self.widen(self.perceptron_norm(x))))
        return x + hidden


def small_normal(*shape: int) -> nn.Parameter:
    """Return a parameter of small random numbers, as transformers begin with."""
    return nn.Parameter(0.02 * torch.randn(shape))
