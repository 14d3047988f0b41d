"""The demonstration's GPT and text: those of examples/train_language_model.py, on a CPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from bench.tasks import text
from bench.tasks.task import Batch, Task

EXAMPLES = Path(__file__).parents[2] / "examples"
MEGABYTES = 8
HELD_OUT_BATCHES = 32


def _example(name: str) -> Any:
    """Import a module of examples/, which find each other on Python's path."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return import_module(name)


@functools.cache
def corpus() -> Any:
    """Return the standard library's files, every tenth of them held out."""
    found = _example("corpus")
    return found.read_corpus(found.STANDARD_LIBRARY, "*.py", MEGABYTES * 10**6)


def batches(context: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield bytes and the bytes that follow them, from random places."""
    for piece in corpus().batches(batch_size, context, seed):
        yield piece[:, :-1], piece[:, 1:]


def held_out_batches(context: int, batch_size: int) -> Sequence[Batch]:
    """Return batches spread evenly over the files that are not trained on."""
    pieces = corpus().evaluation(HELD_OUT_BATCHES, batch_size, context)
    return [(piece[:, :-1], piece[:, 1:]) for piece in pieces]


def model(context: int, width: int, heads: int, layers: int) -> nn.Module:
    """Return the GPT."""
    made: nn.Module = _example("gpt").GPT(vocabulary=256, context=context, width=width, heads=heads, layers=layers)
    return made


def demonstration(context: int, batch_size: int, width: int, heads: int, layers: int, lr: float = 3e-3) -> Task:
    """Return the task of the demonstration."""
    return Task(
        "gpt",
        "the demonstration's GPT and text",
        partial(model, context, width, heads, layers),
        partial(batches, context, batch_size),
        partial(held_out_batches, context, batch_size),
        text.loss,
        lr,
    )
