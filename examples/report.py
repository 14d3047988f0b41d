"""The output of the examples: progress bars, a table, a picture, and results.json with all results."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Run, by_variant, state_bytes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import agr_cuda


def progress_bar(console: Console) -> Progress:
    """Return a progress display with a bar for each optimizer, beside which it shows the task's field `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def print_table(
    console: Console,
    title: str,
    caption: str,
    columns: Mapping[str, Callable[[list[Run]], str]],
    runs: Sequence[Run],
) -> None:
    """Print a table with a row for each optimizer: the example's own columns, then times and the backend."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("Optimizer", no_wrap=True)
    for header in (*columns, "Step", "Optimizer's\nshare of it", "State"):
        table.add_column(header, justify="right")
    table.add_column("Backend", overflow="fold")
    for variant, group in by_variant(runs).items():
        seconds = [s for run in group for s in run.step_seconds]
        shares = [share for run in group for share in run.optimizer_shares()]
        table.add_row(
            variant.label,
            *(cell(group) for cell in columns.values()),
            f"{1e3 * statistics.median(seconds):.1f} ms" if seconds else "-",
            f"{100 * statistics.median(shares):.1f}%" if shares else "-",
            f"{state_bytes(group[0].optimizer) / 1e6:.2f} MB",
            ", ".join(sorted({name for run in group for name in run.optimizer.backends})) or "-",
        )
    console.print(table)
    console.print(f"{caption} Step: median time of forward, backward and optimizer.", highlight=False)


def start_picture(title: str, *panels: tuple[str, str, str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each tuple of title, label of the x axis and label of the y axis."""
    figure = Figure(figsize=(5.2 * len(panels), 4.6), dpi=140, layout="constrained")
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
    """Save the picture and results.json, and print their paths."""
    picture, results = options.output / "curves.png", options.output / "results.json"
    figure.savefig(picture)
    write_results(results, options, **summary, runs=[_as_dict(run) for run in runs])
    for what, path in (("Picture", picture), ("Figures", results)):
        console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


def write_results(path: Path, options: argparse.Namespace, **content: Any) -> None:
    """Write results as JSON, with the options and versions that gave them, into a folder that is made if missing."""
    document = {
        "options": {name: value if _is_plain(value) else str(value) for name, value in vars(options).items()},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "agr_cuda": agr_cuda.__version__,
            "device": _device_name(options.device),
        },
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def _as_dict(run: Run) -> dict[str, Any]:
    return {
        "optimizer": run.variant.label,
        "agr": run.variant.agr,
        "seed": run.seed,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "state_bytes": state_bytes(run.optimizer),
        "steps": len(run.train_loss),
        "backends": run.optimizer.backends,
        "median_step_seconds": _median(run.step_seconds),
        "median_optimizer_seconds": _median(run.optimizer_seconds),
        "median_optimizer_share": _median(run.optimizer_shares()),
        "train_loss": _finite(run.train_loss),
        "evaluated_at": run.evaluated_at,
        **{name: _finite(values) for name, values in run.measures.items()},
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _finite(values: Iterable[float]) -> list[float | None]:
    """Replace the NaN and inf of a diverged run, which JSON cannot represent, by None, which becomes null."""
    return [value if math.isfinite(value) else None for value in values]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _device_name(on: torch.device) -> str:
    return torch.cuda.get_device_name(on) if on.type == "cuda" else f"{on} ({platform.machine()})"


def smoothed(values: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Return steps and, for each, the mean of the last `window` values. With fewer values, the window is 1."""
    if len(values) < window:
        window = 1
    means = [statistics.fmean(values[end - window : end]) for end in range(window, len(values) + 1)]
    return list(range(window, len(values) + 1)), means
