"""Train a small convolutional network on handwritten digits with AdamW, AGR-AdamW, Adan and AGR-Adan.

The images come with scikit-learn: 1,797 digits of 8x8 pixels. For each of several seeds, a fifth of them is set
aside for testing. All optimizers start from the same weights, see the same batches, and make one step each in turn.
The spread over the seeds shows whether a difference between optimizers is significant.

Needs: pip install "agr-cuda[examples]"
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from command_line import add_machine_options, add_optimizer_options, device_option, prepare, whole
from common import VARIANTS, Run, by_variant, clock, in_turn, start_runs
from matplotlib.axes import Axes
from report import print_table, progress_bar, save_report, start_picture
from rich.console import Console
from rich.progress import Progress, TaskID
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed options, or exit with a message if one is invalid."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[device_option()],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seeds", metavar="N", type=whole(1), default=5, help="how many seeds to repeat everything with"
    )
    parser.add_argument("--epochs", metavar="N", type=whole(1), default=15, help="passes over the training images")
    parser.add_argument("--batch-size", metavar="N", type=whole(1), default=64, help="images in a batch")
    parser.add_argument("--channels", metavar="N", type=whole(1), default=16, help="channels of the first convolution")
    add_machine_options(
        parser,
        output="runs/digits",
        seed_help="the first seed: of split, weights and batches",
    )
    add_optimizer_options(parser, adamw_lr=2e-2, adan_lr=8e-2, weight_decay=0.05, warmup=0.1)
    options = parser.parse_args(arguments)
    prepare(parser, options)
    return options


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 1, 8, 8) in [0, 1] and their digits of shape (n), split into a training and a test set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def split_digits(seed: int, on: torch.device) -> Digits:
    """Return the digits with a fifth set aside for testing, the same share of each digit."""
    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=0.2, random_state=seed, stratify=data.target)
    train_images, test_images = (torch.tensor(p, dtype=torch.float32, device=on)[:, None] / 16 for p in parts[:2])
    train_labels, test_labels = (torch.tensor(p, dtype=torch.long, device=on) for p in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


def make_network(channels: int) -> nn.Sequential:
    """Return two convolutions and a linear layer, from (n, 1, 8, 8) to (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 4 * 4, 10),
    )


@torch.no_grad()
def test(run: Run, digits: Digits) -> None:
    """Record the run's loss and accuracy on the test images."""
    logits = run.model(digits.test_images)
    correct = (logits.argmax(dim=1) == digits.test_labels).double().mean()
    run.record(test_loss=F.cross_entropy(logits, digits.test_labels).item(), test_accuracy=correct.item())


def train_one_seed(
    options: argparse.Namespace, seed: int, runs: list[Run], progress: Progress, bars: Sequence[TaskID]
) -> None:
    """Train with every optimizer from one seed. The new runs are appended to `runs` before their first step."""
    digits = split_digits(seed, options.device)
    torch.manual_seed(seed)
    model = make_network(options.channels).to(options.device)
    order = torch.Generator().manual_seed(seed)
    now = clock(options.device)
    count = len(digits.train_labels)
    own = start_runs(model, options, options.epochs * math.ceil(count / options.batch_size), seed)
    runs.extend(own)
    for run in own:
        test(run, digits)
    step = 0
    for _ in range(options.epochs):
        shuffled = torch.randperm(count, generator=order).to(options.device)
        for chosen in torch.split(shuffled, options.batch_size):
            images, labels = digits.train_images[chosen], digits.train_labels[chosen]
            for run in in_turn(own, step):
                # The defaults bind this iteration's batch. mypy infers no type for a lambda with defaults.
                run.advance(lambda m, x=images, y=labels: F.cross_entropy(m(x), y), now)  # type: ignore[misc]
            step += 1
        for run, bar in zip(own, bars, strict=True):
            test(run, digits)
            note = f"seed {seed}: {100 * run.last('test_accuracy'):.1f}% right"
            progress.update(bar, advance=1, note=note)


def mean_and_spread(group: Sequence[Run], measure: str, scale: float, form: str) -> str:
    """Return the mean over seeds and, if there are several, the standard deviation, as text."""
    values = [scale * run.last(measure) for run in group if run.evaluated_at]
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def report(
    options: argparse.Namespace, runs: Sequence[Run], console: Console, seconds: float, interrupted: bool
) -> None:
    """Print the table, and save the picture and results.json."""
    seeds = len({run.seed for run in runs})
    columns: dict[str, Callable[[list[Run]], str]] = {
        "Test\naccuracy (%)": lambda group: mean_and_spread(group, "test_accuracy", 100, ".2f"),
        "Test loss": lambda group: mean_and_spread(group, "test_loss", 1, ".3f"),
    }
    caption = f"Mean ± standard deviation over {seeds} seeds, each with its own split, weights and batches."
    print_table(console, f"{options.epochs} epochs in {seconds:.0f} s", caption, columns, runs)

    figure, (loss, errors) = start_picture(
        f"Handwritten digits: mean of {seeds} seeds, band of ± 1 standard deviation",
        ("Test loss", "epoch", "loss (nats)"),
        ("Test errors", "epoch", "wrong answers (%)"),
    )
    for variant, group in by_variant(runs).items():
        wrong = [[100 * (1 - right) for right in run.measures.get("test_accuracy", [])] for run in group]
        draw(loss, [run.measures.get("test_loss", []) for run in group], variant.line)
        draw(errors, wrong, variant.line)
    errors.legend()
    save_report(console, figure, options, runs, seconds=seconds, interrupted=interrupted)


def draw(panel: Axes, curves: Sequence[Sequence[float]], line: dict[str, Any]) -> None:
    """Draw the mean of several curves over epochs with a band of ± 1 standard deviation, on a logarithmic scale."""
    lowest = 1e-2
    means, spreads = [], []
    for epoch in range(max(map(len, curves))):
        values = [curve[epoch] for curve in curves if epoch < len(curve)]  # an interrupted run has fewer epochs
        means.append(max(lowest, statistics.fmean(values)))
        spreads.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    epochs = range(len(means))
    below = [max(lowest, mean - spread) for mean, spread in zip(means, spreads, strict=True)]
    above = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.plot(epochs, means, **line)
    panel.fill_between(epochs, below, above, color=line["color"], alpha=0.12, linewidth=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example and return the exit status, which is 130 if Ctrl-C ended the training."""
    options = parse_options(arguments)
    console = Console()
    runs: list[Run] = []
    begin, interrupted = time.perf_counter(), False
    try:
        with progress_bar(console) as progress:
            total = options.seeds * options.epochs
            labels = [VARIANTS[name].label for name in options.optimizers]
            bars = [progress.add_task(label, total=total, note="") for label in labels]
            for seed in range(options.seed, options.seed + options.seeds):
                train_one_seed(options, seed, runs, progress, bars)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Stopped; this is what was done so far.")
    finished = [run for run in runs if len(run.measures.get("test_loss", [])) > options.epochs]
    report(options, finished or runs, console, time.perf_counter() - begin, interrupted)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
