"""Train a perceptron whose updates are too small for bfloat16, with each of the ways to store its numbers.

The learning rate is so low that most updates are smaller than half a unit in the last place of a bfloat16 weight.
Rounding to nearest loses those altogether, stochastic rounding keeps them on average, float32 masters keep them all.
The images come with scikit-learn: 1,797 handwritten digits of 8x8 pixels. All runs start from the same weights, which
are bfloat16 values, and see the same batches.

Needs: pip install "agr-cuda[examples]"
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command_line import device_option, number, whole
from common import state_bytes
from matplotlib.figure import Figure
from report import start_picture, write_results
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import agr_cuda

#: Points of a loss curve.
EVALUATIONS = 25
BATCH_SIZE = 64


@dataclass(frozen=True)
class Storage:
    """What a run's numbers are stored as: the parameters' type, the optimizer's options, and the curve's colour."""

    label: str
    dtype: torch.dtype
    options: dict[str, Any]
    colour: str


STORAGES = (
    Storage("float32", torch.float32, {}, "#a3a3a3"),
    Storage("float32, 8-bit state", torch.float32, {"state_dtype": "8bit"}, "#3c7a3a"),
    Storage("bfloat16, float32 master", torch.bfloat16, {"master_weights": True}, "#004c7f"),
    Storage("bfloat16, stochastic rounding", torch.bfloat16, {"stochastic_rounding": True}, "#56a8dd"),
    Storage("bfloat16, rounded to nearest", torch.bfloat16, {}, "#b03a00"),
)


@dataclass
class Result:
    """The losses of a run after some of its steps, and the memory of its parameters and their state."""

    storage: Storage
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stored_bytes: int = 0


def train(storage: Storage, initial: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace) -> Result:
    """Train a copy of the initial network."""
    model = copy.deepcopy(initial).to(storage.dtype)
    optimizer = agr_cuda.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0, **storage.options)
    inputs, order, result = images.to(storage.dtype), torch.Generator().manual_seed(0), Result(storage)
    for step in range(options.steps + 1):
        if step % max(1, options.steps // EVALUATIONS) == 0 or step == options.steps:
            result.steps.append(step)
            result.losses.append(loss_of(model, images, labels))
        if step < options.steps:
            batch = torch.randint(len(labels), (BATCH_SIZE,), generator=order).to(labels.device)
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(inputs[batch]).float(), labels[batch]))
            optimizer.step()
    result.stored_bytes = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
    return result


@torch.no_grad()
def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the loss on all images, computed in float32, so that only what the weights are stored as matters."""
    return F.cross_entropy(copy.deepcopy(model).float()(images), labels).item()


def print_table(results: Sequence[Result]) -> None:
    """Print each run's final loss, how far it is from the first run's, and its memory."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Stored as", no_wrap=True)
    for header in ("Loss", "Beside\nfloat32", "Parameters\nand state"):
        table.add_column(header, justify="right")
    for result in results:
        last, first = result.losses[-1], results[0].losses[-1]
        size = f"{result.stored_bytes:,} bytes"
        table.add_row(result.storage.label, f"{last:.4f}", f"{100 * (last / first - 1):+.2f}%", size)
    Console().print(table)


def records(results: Sequence[Result]) -> dict[str, Any]:
    """Return results ready for JSON: a row for each storage."""
    return {
        "rows": [
            {
                "stored_as": result.storage.label,
                "stored_bytes": result.stored_bytes,
                "steps": result.steps,
                "losses": result.losses,
            }
            for result in results
        ]
    }


def figure(found: Mapping[str, Any]) -> Figure:
    """Return a picture of the loss curves: the first is thick, since most of the others lie on top of it."""
    made, (panel,) = start_picture("Updates too small for bfloat16", ("Loss on all images", "step", "loss (nats)"))
    colours = {storage.label: storage.colour for storage in STORAGES}
    for place, row in enumerate(found["rows"]):
        label, width = row["stored_as"], 1.4 if place else 5.0
        panel.plot(row["steps"], row["losses"], label=label, color=colours[label], linewidth=width)
    panel.legend(fontsize=8)
    panel.set_ylim(bottom=0)
    return made


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Train with every storage, print the table, and return the results."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[device_option()],
        allow_abbrev=False,
    )
    parser.add_argument("--steps", metavar="N", type=whole(1), default=1000, help="steps of each run")
    parser.add_argument("--lr", metavar="X", type=number(above=True), default=1e-4, help="learning rate")
    parser.add_argument("--threads", metavar="N", type=whole(1), default=1, help="CPU threads of PyTorch")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="where to draw the loss curves")
    parser.add_argument("--results", metavar="FILE", type=Path, help="where to write the losses as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images, labels = (torch.tensor(x, device=options.device) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    images -= images.mean(dim=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(options.device)
    initial = model.bfloat16().float()
    results = [train(storage, initial, images, labels, options) for storage in STORAGES]
    print_table(results)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        figure(records(results)).savefig(options.picture)
    if options.results:
        write_results(options.results, options, **records(results))
    return results


if __name__ == "__main__":
    main()
