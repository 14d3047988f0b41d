"""What a task consists of: a model, batches of training data, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # inputs and targets


@dataclass(frozen=True)
class Task:
    """A model and its data. Weights depend on PyTorch's seed, batches on the seed that is given."""

    name: str
    description: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]  # endless
    loss: Callable[[nn.Module, Batch], Tensor]  # the mean over a batch
    lr: float  # with which AdamW trains it well
