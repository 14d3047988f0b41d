"""A byte-level GPT on the source of Python's standard library, which every installation has."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tasks.blocks import Block, small_normal
from bench.tasks.task import Batch, Task

BYTES = 2_000_000
CONTEXT, BATCH_SIZE, WIDTH, HEADS, LAYERS = 64, 16, 96, 4, 3


class Gpt(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = small_normal(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, causal=True) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next byte at each position."""
        hidden = self.norm(self.blocks(self.embedding(tokens) + self.position))
        return F.linear(hidden, self.embedding.weight)


@functools.cache
def corpus() -> Tensor:
    """Return the first bytes of the standard library's files, in the order of their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(library.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= BYTES:
            break
    return torch.frombuffer(text[:BYTES], dtype=torch.uint8)


def batches(seed: int) -> Iterator[Batch]:
    """Yield bytes and the bytes that follow them, from random places."""
    generator = torch.Generator().manual_seed(seed)
    text = corpus()
    while True:
        begins = torch.randint(len(text) - CONTEXT, (BATCH_SIZE, 1), generator=generator)
        piece = text[begins + torch.arange(CONTEXT + 1)].long()
        yield piece[:, :-1], piece[:, 1:]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of the next byte, in nats."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


GPT_TASK = Task("gpt", "byte-level GPT, Python's standard library", Gpt, batches, loss, lr=3e-3)
