"""What a task consists of: a model, batches of training data, held-out data, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Batch = tuple[Tensor, ...]  # what goes into the model, and what should come out, as the task's loss expects them


@dataclass(frozen=True)
class Task:
    """A model and its data. Weights depend on PyTorch's seed, batches on the seed that is given.

    Attributes:
        name: as the command line takes it.
        description: what is trained on what.
        model: makes the model, on the CPU.
        batches: yields training batches without end, by a seed.
        held_out: returns batches that are never trained on, the same ones each time.
        loss: returns the mean loss of a batch.
        lr: the learning rate with which AdamW trains it well.
        score: what else is worth knowing of a held-out batch, by name, as a mean over it.
    """

    name: str
    description: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    held_out: Callable[[], Sequence[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    lr: float
    score: tuple[str, Callable[[nn.Module, Batch], Tensor]] | None = None
