"""What the examples share: options, the four optimizers, timed training steps, and the report.

The report is a table on the terminal, a picture of the curves and a results.json with every figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import agr_cuda


@dataclass(frozen=True)
class Variant:
    """One of the optimizers compared, and how it is drawn: colour for the rule, solid line for AGR."""

    label: str
    rule: str
    agr: bool
    colour: str

    @property
    def line(self) -> dict[str, Any]:
        """The matplotlib properties of its curves."""
        return {
            "label": self.label,
            "color": self.colour,
            "linestyle": "-" if self.agr else (0, (4, 2)),
            "linewidth": 1.6,
        }


VARIANTS = {
    "adamw": Variant("AdamW", "adamw", agr=False, colour="#56a8dd"),
    "agr-adamw": Variant("AGR-AdamW", "adamw", agr=True, colour="#004c7f"),
    "adan": Variant("Adan", "adan", agr=False, colour="#f0a050"),
    "agr-adan": Variant("AGR-Adan", "adan", agr=True, colour="#b03a00"),
}


# Options.


def whole(minimum: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that are at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return value

    return parse


def number(*, minimum: float = 0.0, maximum: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a parser of finite numbers from `minimum` (or only above it) to `maximum`."""
    allowed = f"{'above' if above else 'of at least'} {minimum:g}"
    if maximum < math.inf:
        allowed += f" and at most {maximum:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        in_range = minimum <= value <= maximum and not (above and value == minimum)
        if not (math.isfinite(value) and in_range):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {allowed}")
        return value

    return parse


def device(text: str) -> torch.device:
    """Parse the name of a device that is there."""
    try:
        chosen = torch.device(text)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is no device that is there ({reason})") from None
    return chosen


def device_option(description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of --device alone, to be read before the options whose defaults depend on it."""
    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=found, help="where to train: cpu, cuda, cuda:1, ...")
    return parser


def add_optimizer_options(
    parser: argparse.ArgumentParser, *, adamw_lr: float, adan_lr: float, weight_decay: float, warmup: float
) -> None:
    """Add the options on the optimizers and their learning rate schedule."""
    group = parser.add_argument_group("optimizers")
    group.add_argument(
        "--optimizers", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which to train side by side"
    )
    group.add_argument(
        "--adamw-lr", type=number(above=True), default=adamw_lr, help="peak learning rate of AdamW and AGR-AdamW"
    )
    group.add_argument(
        "--adan-lr", type=number(above=True), default=adan_lr, help="peak learning rate of Adan and AGR-Adan"
    )
    group.add_argument(
        "--weight-decay", type=number(), default=weight_decay, help="weight decay, of matrices and kernels alone"
    )
    group.add_argument(
        "--max-grad-norm", type=number(), default=1.0, help="clip gradients to this global norm; 0 does not clip"
    )
    group.add_argument(
        "--warmup",
        type=number(maximum=1.0),
        default=warmup,
        help="share of the steps in which the learning rate rises; it then falls along a cosine to a tenth",
    )
    group.add_argument(
        "--backend",
        choices=("auto", "cuda", "triton", "cpu", "reference"),
        default="auto",
        help="which implementation makes the step; auto takes the fastest one for the device",
    )


def add_machine_options(parser: argparse.ArgumentParser, *, output: str, seed: int = 0) -> None:
    """Add the options on seed, threads and output folder."""
    parser.add_argument("--seed", type=whole(0), default=seed, help="seed of the initial weights and batches")
    parser.add_argument(
        "--threads", type=whole(1), default=torch.get_num_threads(), help="CPU threads that PyTorch may use"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(output), metavar="DIR", help="folder for the picture and results.json"
    )


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check what argparse cannot, set the number of threads and make the output folder; exits on a bad option."""
    torch.set_num_threads(options.threads)
    options.optimizers = list(dict.fromkeys(options.optimizers))
    probe = torch.zeros(2, device=options.device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        agr_cuda.AdamW([probe], backend=backend_name(options)).step()
    except (RuntimeError, ValueError) as error:
        parser.error(f"argument --backend: {error}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot make the folder {str(options.output)!r}: {error.strerror}")


def backend_name(options: argparse.Namespace) -> str | None:
    """Return --backend as the optimizers take it: None chooses for each parameter."""
    return None if options.backend == "auto" else str(options.backend)


# Optimizers.


def parameter_groups(model: nn.Module, weight_decay: float, agr: bool) -> list[dict[str, Any]]:
    """Sort parameters by what weight decay and AGR should do to them.

    - Matrices and convolution kernels: decayed and regularized.
    - Biases, and the gains of norms: not decayed, since decay would pull gains to 0. AGR stays on, as in the
      paper, which applies it to every tensor: of an n-element vector's gradient it takes about 1/n.
    - Tensors of one element: AGR makes their gradient exactly 0, so that they would never train. It is off.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1 and p.numel() > 1], "weight_decay": weight_decay, "agr": agr},
        {"params": [p for p in parameters if p.dim() <= 1 and p.numel() > 1], "weight_decay": 0.0, "agr": agr},
        {"params": [p for p in parameters if p.numel() == 1], "weight_decay": 0.0, "agr": False},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(variant: Variant, model: nn.Module, options: argparse.Namespace) -> agr_cuda.AdamW | agr_cuda.Adan:
    """Return the variant's optimizer over the model's parameters."""
    groups = parameter_groups(model, options.weight_decay, variant.agr)
    clip, backend = options.max_grad_norm, backend_name(options)
    if variant.rule == "adan":
        return agr_cuda.Adan(groups, lr=options.adan_lr, max_grad_norm=clip, backend=backend)
    return agr_cuda.AdamW(groups, lr=options.adamw_lr, max_grad_norm=clip, backend=backend)


def warmup_cosine(steps: int, warmup: float, floor: float = 0.1) -> Callable[[int], float]:
    """Return the learning rate's factor at a step: a linear rise, then a cosine from 1 down to `floor`."""
    rise = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        fallen = min(1.0, (step - rise) / max(1, steps - rise))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * fallen))

    return factor


# Training.


@dataclass(eq=False)
class Run:
    """A model in training under one optimizer, and everything measured on the way."""

    variant: Variant
    seed: int
    model: nn.Module
    optimizer: agr_cuda.AdamW | agr_cuda.Adan
    scheduler: LambdaLR
    train_loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    evaluated_at: list[int] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=dict)

    def advance(self, compute_loss: Callable[[nn.Module], Tensor], now: Callable[[], float]) -> None:
        """Make one training step: forward, backward, optimizer. Clip is a part of the optimizer's step."""
        begin = now()
        loss = compute_loss(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        before = now()
        self.optimizer.step()
        after = now()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.train_loss.append(loss.item())
        self.step_seconds.append(after - begin)
        self.optimizer_seconds.append(after - before)

    def record(self, **measures: float) -> None:
        """Note what an evaluation of the model found, after the steps made so far."""
        self.evaluated_at.append(len(self.train_loss))
        for name, value in measures.items():
            self.measures.setdefault(name, []).append(value)

    def last(self, measure: str) -> float:
        """Return what the last evaluation found, NaN before the first."""
        return self.measures.get(measure, [math.nan])[-1]


def start_runs(model: nn.Module, options: argparse.Namespace, steps: int, seed: int) -> list[Run]:
    """Return a run for each optimizer asked for, all starting from the weights of `model`."""
    runs = []
    for name in options.optimizers:
        variant, own = VARIANTS[name], copy.deepcopy(model)
        optimizer = make_optimizer(variant, own, options)
        schedule = LambdaLR(optimizer, warmup_cosine(steps, options.warmup))
        runs.append(Run(variant, seed, own, optimizer, schedule))
    return runs


def in_turn(runs: Sequence[Run], step: int) -> Iterable[Run]:
    """Yield the runs, another one first at every step, so that none always finds the caches as the last left them."""
    first = step % len(runs)
    yield from runs[first:]
    yield from runs[:first]


def clock(on: torch.device) -> Callable[[], float]:
    """Return a clock that waits for the device's pending work before it reads the time, in seconds."""
    synchronize = torch.get_device_module(on).synchronize

    def now() -> float:
        synchronize()
        return time.perf_counter()

    return now


def progress_bar(console: Console) -> Progress:
    """Return a bar for each optimizer, with a note (the task's field `note`)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


# The report.


def by_variant(runs: Iterable[Run]) -> dict[Variant, list[Run]]:
    """Group runs (of several seeds) by optimizer."""
    groups: dict[Variant, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def print_table(
    console: Console, title: str, caption: str, columns: Mapping[str, Callable[[list[Run]], str]], runs: Sequence[Run]
) -> None:
    """Print a row for each optimizer: the example's own columns, then time and backend."""
    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    table.add_column("Optimizer", no_wrap=True)
    for header in (*columns, "Time of a step (median)", "Share in optimizer"):
        table.add_column(header, justify="right")
    table.add_column("Backend", overflow="fold")
    for variant, group in by_variant(runs).items():
        seconds = [s for run in group for s in run.step_seconds]
        shares = [o / s for run in group for o, s in zip(run.optimizer_seconds, run.step_seconds, strict=True)]
        table.add_row(
            variant.label,
            *(cell(group) for cell in columns.values()),
            f"{1e3 * statistics.median(seconds):.1f} ms" if seconds else "-",
            f"{100 * statistics.median(shares):.1f}%" if shares else "-",
            ", ".join(sorted({name for run in group for name in run.optimizer.backends})) or "-",
        )
    console.print(table)


def start_picture(title: str, *panels: tuple[str, str, str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each (title, label of x, label of y)."""
    figure = Figure(figsize=(5.6 * len(panels), 4.6), dpi=140, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for panel, (name, x, y) in zip(axes, panels, strict=True):
        panel.set(title=name, xlabel=x, ylabel=y)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_report(
    console: Console, figure: Figure, options: argparse.Namespace, runs: Sequence[Run], **summary: Any
) -> None:
    """Save the picture and results.json, and say where they are."""
    picture, results = options.output / "curves.png", options.output / "results.json"
    figure.savefig(picture)
    content = {
        **summary,
        "options": {name: value if _is_plain(value) else str(value) for name, value in vars(options).items()},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "agr_cuda": agr_cuda.__version__,
            "device": _device_name(options.device),
        },
        "runs": [_as_dict(run) for run in runs],
    }
    results.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    for what, path in (("Picture", picture), ("Figures", results)):
        console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


def _as_dict(run: Run) -> dict[str, Any]:
    return {
        "optimizer": run.variant.label,
        "agr": run.variant.agr,
        "seed": run.seed,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": len(run.train_loss),
        "backends": run.optimizer.backends,
        "median_step_seconds": statistics.median(run.step_seconds) if run.step_seconds else None,
        "median_optimizer_seconds": statistics.median(run.optimizer_seconds) if run.optimizer_seconds else None,
        "train_loss": _finite(run.train_loss),
        "evaluated_at": run.evaluated_at,
        **{name: _finite(values) for name, values in run.measures.items()},
    }


def _finite(values: Iterable[float]) -> list[float | None]:
    """Return the values with None, JSON's null, for what JSON cannot hold: a diverged run's NaN and inf."""
    return [value if math.isfinite(value) else None for value in values]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _device_name(on: torch.device) -> str:
    return torch.cuda.get_device_name(on) if on.type == "cuda" else f"{on} ({platform.machine()})"
