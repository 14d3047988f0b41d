"""A small GPT in plain PyTorch: pre-norm blocks of causal attention and a GELU MLP, with learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = linear(width, 3 * width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = linear(width, 4 * width)
        # Each layer adds two outputs to the residual stream. With this scale, the variance of their sum starts near 1.
        self.attention_out = linear(width, width, scale=(2 * layers) ** -0.5)
        self.contract = linear(4 * width, width, scale=(2 * layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map activations of shape (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        projected = self.query_key_value(self.attention_norm(x))
        by_head = projected.view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = by_head.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.expand(self.mlp_norm(x)), approximate="tanh")
        y: Tensor = x + self.contract(hidden)
        return y


class GPT(nn.Module):
    """Predicts each next token of a sequence no longer than `context`.

    The head is not tied to the embedding: with 256 tokens its weights are few, and each of the two matrices can start
    at a suitable scale.
    """

    def __init__(self, *, vocabulary: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, vocabulary)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, length) to logits of shape (batch, length, vocabulary)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """Return a linear layer whose weights have variance `scale`^2 / inputs and whose bias is 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=scale * inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, length: int, *, temperature: float, generator: torch.Generator) -> Tensor:
    """Return `prompt`, a vector of tokens, followed by `length` tokens, sampled one by one.

    `generator` is on the CPU for every device of the model, so that a seed gives the same random numbers everywhere.
    """
    tokens = prompt
    for _ in range(length):
        logits = model(tokens[None, -model.context :])[0, -1].float().cpu()
        drawn = torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)])
    return tokens
