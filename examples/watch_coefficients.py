"""Train a small GPT and watch what AGR takes from each tensor's gradient, by its size and over time.

AGR scales an element by one minus its share a_i of the tensor's abs-sum, so that it takes the sum of a_i^2 of the
abs-sum. That is 1/n where all n elements are alike, and more where few of them have most of the gradient.

Needs: pip install "agr-cuda[examples]"
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import device_option, whole
from corpus import STANDARD_LIBRARY, Corpus, read_corpus
from gpt import GPT
from matplotlib.figure import Figure
from report import start_picture, write_results
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import agr_cuda

CONTEXT = 64
BATCH_SIZE = 8
#: Points of a curve.
MEASUREMENTS = 60
COLOURS = {"matrix": "#004c7f", "embedding": "#3c7a3a", "norm": "#f0a050", "bias": "#b03a00"}


class Watched:
    """A model's parameters, and the share of each gradient's abs-sum that AGR took in some of the steps."""

    def __init__(self, model: GPT, kinds: dict[str, str]) -> None:
        self.sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.kinds = kinds
        self.steps: list[int] = []
        self.removed: dict[str, list[float]] = {name: [] for name in self.sizes}

    def look(self, model: GPT, step: int) -> None:
        """Record the coefficients of the gradients that are there."""
        self.steps.append(step)
        for name, found in agr_cuda.coefficients(model).items():
            self.removed[name].append(found.removed)

    def of_kind(self, kind: str) -> list[str]:
        """Return the names of the parameters of a kind."""
        return [name for name in self.sizes if self.kinds[name] == kind]

    def median(self, name: str) -> float:
        """Return the median share over the measurements."""
        return statistics.median(self.removed[name])


def train(options: argparse.Namespace, corpus: Corpus) -> Watched:
    """Train with AGR-AdamW, and look at the gradients between backward() and step()."""
    torch.manual_seed(options.seed)
    model = GPT(vocabulary=256, context=CONTEXT, width=options.width, heads=4, layers=options.layers).to(options.device)
    groups = agr_cuda.parameter_groups(model, weight_decay=0.1)
    optimizer = agr_cuda.AdamW(groups, lr=3e-3, max_grad_norm=1.0)
    watched = Watched(model, groups.kinds)
    every = max(1, options.steps // MEASUREMENTS)
    for step, batch in zip(range(options.steps), corpus.batches(BATCH_SIZE, CONTEXT, options.seed), strict=False):
        tokens = batch.to(options.device)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
        if step % every == 0:
            watched.look(model, step)
        optimizer.step()
    return watched


def records(watched: Watched) -> dict[str, Any]:
    """Return what was watched, ready for JSON: a row for each parameter, with the shares at these steps."""
    rows = [
        {"name": name, "kind": watched.kinds[name], "elements": size, "removed": watched.removed[name]}
        for name, size in watched.sizes.items()
    ]
    return {"steps": watched.steps, "rows": rows}


def print_table(watched: Watched) -> None:
    """Print a row for each kind of parameter."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Kind", no_wrap=True)
    for header in ("Tensors", "Elements", "AGR takes", "times 1/n"):
        table.add_column(header, justify="right")
    for kind in COLOURS:
        names = watched.of_kind(kind)
        sizes, taken = [watched.sizes[name] for name in names], [watched.median(name) for name in names]
        times = statistics.median(share * n for share, n in zip(taken, sizes, strict=True))
        shares = f"{100 * min(taken):.3g}% to {100 * max(taken):.3g}%"
        table.add_row(kind, str(len(names)), f"{min(sizes):,} to {max(sizes):,}", shares, f"{times:.1f}")
    Console().print(table)
    print("AGR takes: share of a gradient's abs-sum, median over the steps; of the least and the most affected tensor.")


def figure(found: Mapping[str, Any]) -> Figure:
    """Return a picture of the records: the shares by the number of elements, and over time."""
    made, (by_size, over_time) = start_picture(
        "What AGR takes of a gradient's abs-sum",
        ("Each tensor, median over the steps", "elements", "share"),
        ("Each tensor, over time", "step", "share"),
    )
    for kind, colour in COLOURS.items():
        rows = [row for row in found["rows"] if row["kind"] == kind]
        medians = [statistics.median(row["removed"]) for row in rows]
        by_size.scatter([row["elements"] for row in rows], medians, s=18, color=colour, label=kind, zorder=3)
        for row in rows:
            over_time.plot(found["steps"], row["removed"], color=colour, linewidth=0.7, alpha=0.7)
    sizes = [row["elements"] for row in found["rows"]]
    ends = [min(sizes), max(sizes)]
    by_size.plot(ends, [1 / n for n in ends], color="#a3a3a3", label="1/n: all elements alike")
    by_size.set_xscale("log")
    for panel in (by_size, over_time):
        panel.set_yscale("log")
    by_size.legend(fontsize=8)
    return made


def main(arguments: Sequence[str] | None = None) -> Watched:
    """Train, print the table, and return what was found."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[device_option()],
        allow_abbrev=False,
    )
    parser.add_argument("--steps", metavar="N", type=whole(1), default=300, help="training steps")
    parser.add_argument("--layers", metavar="N", type=whole(1), default=3, help="blocks of the model")
    parser.add_argument("--width", metavar="N", type=whole(1), default=128, help="width of the model, a multiple of 4")
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help="seed of weights and batches")
    parser.add_argument("--threads", metavar="N", type=whole(1), default=1, help="CPU threads of PyTorch")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="where to draw the shares")
    parser.add_argument("--results", metavar="FILE", type=Path, help="where to write the shares as JSON")
    options = parser.parse_args(arguments)
    if options.width % 4:
        parser.error(f"argument --width: {options.width} is not a multiple of 4")
    torch.set_num_threads(options.threads)
    watched = train(options, read_corpus(STANDARD_LIBRARY, "*.py", limit=2_000_000))
    print_table(watched)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        figure(records(watched)).savefig(options.picture)
    if options.results:
        write_results(options.results, options, **records(watched))
    return watched


if __name__ == "__main__":
    main()
