"""A byte-level GPT on the source of Python's standard library, which every installation has."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tasks.blocks import Block, small_normal
from bench.tasks.task import Batch, Task

BYTES, HELD_OUT_BYTES = 2_000_000, 200_000
HELD_OUT_TOKENS = 4096  # at least, of which the held-out loss is the mean


class Gpt(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = small_normal(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next byte at each position."""
        hidden = self.norm(self.blocks(self.embedding(tokens) + self.position))
        return F.linear(hidden, self.embedding.weight)


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """Return the first bytes of the standard library's files in the order of their paths, and those that follow.

    The first part is trained on, the second is held out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(library.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= BYTES + HELD_OUT_BYTES:
            break
    whole = torch.frombuffer(text, dtype=torch.uint8)
    return whole[:BYTES], whole[BYTES : BYTES + HELD_OUT_BYTES]


def batches(context: int, batch_size: int, seed: int, held_out: bool = False) -> Iterator[Batch]:
    """Yield bytes and the bytes that follow them, from random places."""
    generator = torch.Generator().manual_seed(seed)
    text = corpus()[held_out]
    while True:
        begins = torch.randint(len(text) - context, (batch_size, 1), generator=generator)
        piece = text[begins + torch.arange(context + 1)].long()
        yield piece[:, :-1], piece[:, 1:]


def held_out_batches(context: int, batch_size: int) -> Sequence[Batch]:
    """Return batches of text that is not trained on."""
    large = max(batch_size, HELD_OUT_TOKENS // context)
    return [next(batches(context, large, 0, held_out=True))]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of the next byte, in nats."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def gpt(context: int, batch_size: int, width: int, heads: int, layers: int, lr: float = 3e-3) -> Task:
    """Return the task of a GPT of these sizes."""
    return Task(
        "gpt",
        "byte-level GPT, Python's standard library",
        partial(Gpt, context, width, heads, layers),
        partial(batches, context, batch_size),
        partial(held_out_batches, context, batch_size),
        loss,
        lr,
    )
