"""Text for training a language model: the bytes of a folder's files, with every tenth file held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# Subfolders without ordinary source code: other packages, character tables, repetitive tests.
LEFT_OUT = {"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """The bytes to train on, and those of other files to evaluate on, both as uint8 vectors."""

    train: Tensor
    held_out: Tensor

    def batches(self, size: int, context: int, seed: int) -> Iterator[Tensor]:
        """Yield batches of shape (size, context + 1), drawn at random from the training text, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - context, (size,), generator=generator)
            yield windows(self.train, starts, context)

    def evaluation(self, batches: int, size: int, context: int) -> list[Tensor]:
        """Return batches spread evenly over the held-out text, which are the same in every evaluation and run."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, batches * size).long()
        return [windows(self.held_out, part, context) for part in starts.view(batches, size)]


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Return the `context` + 1 bytes from each start: the inputs and, shifted by one, the targets."""
    return text[starts[:, None] + torch.arange(context + 1)].long()


def read_corpus(folder: Path, pattern: str, limit: int) -> Corpus:
    """Read files in sorted order up to `limit` bytes. Every tenth file, or the last of fewer than ten, is held out.

    Raises:
        ValueError: for fewer than two files, since one has to be held out.
    """
    left_out = LEFT_OUT if folder == STANDARD_LIBRARY else set()
    texts, size = [], 0
    for path in sorted(folder.rglob(pattern)):
        if size < limit and path.is_file() and not left_out.intersection(path.relative_to(folder).parts):
            texts.append(path.read_bytes()[: limit - size])
            size += len(texts[-1])
    if len(texts) < 2:
        raise ValueError(
            f"{str(folder)!r} has {len(texts)} files named {pattern!r}; it needs two, one of them to hold out"
        )
    every = min(10, len(texts))
    train = b"".join(text for i, text in enumerate(texts) if i % every != every - 1)
    held_out = b"".join(texts[every - 1 :: every])
    return Corpus(*(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out)))
