"""The tables of `python -m bench train`, for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench.reporting import terminal
from bench.training.analysis import FINAL, Comparison, Runs
from bench.training.arms import ARMS


def percent(value: float) -> str:
    """Return a share in percent, with a sign and three digits that count."""
    return f"{100 * value:+.3g}%"


def difference(comparison: Comparison) -> str:
    """Return a difference with its interval."""
    form = percent if comparison.relative else lambda value: f"{value:+.3g}"
    return f"{form(comparison.difference)} ({form(comparison.lower)} to {form(comparison.upper)})"


def levels(runs: Runs) -> terminal.Table:
    """Return what every arm ends with, at what was chosen for itself."""
    made = terminal.table(
        f"{FINAL}, mean and standard deviation over seeds; each arm with its own learning rate and decay",
        ["arm"],
        [heading for task in runs.tasks for heading in (task, "lr, decay")],
    )
    for name in runs.setting.arms:
        cells = []
        for task in runs.tasks:
            values = [*runs.values(task, name, FINAL, own=True).values()]
            point = runs.point(task, name, own=True)
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells += [
                f"{statistics.fmean(values):.4f}{spread}" if values else "-",
                f"{point.lr:.2g}, {point.weight_decay:g}",
            ]
        made.add_row(ARMS[name].label, *cells)
    return made


def verdicts(runs: Runs, own: bool) -> terminal.Table:
    """Return each arm's difference from its optimizer alone, and the verdict, in every task."""
    how = "each with its own" if own else "both with the optimizer's own"
    made = terminal.table(
        f"change of the {FINAL} by each arm, {how} learning rate and decay: mean, 95% interval, verdict",
        ["arm"],
        runs.tasks,
        "p of paired t-tests, Holm's correction over tasks; what would have been detected in brackets",
    )
    for name in runs.setting.arms:
        if name == ARMS[name].base:
            continue
        found = {c.task: c for c in runs.compare(name, ARMS[name].base, own=own)}
        cells = [
            f"{difference(c)}\n{c.verdict}, p {c.p:.2g} [{100 * c.detectable:.2g}%]" if (c := found.get(task)) else "-"
            for task in runs.tasks
        ]
        made.add_row(ARMS[name].label, *cells)
    return made


def by_measure(runs: Runs, arm: str) -> terminal.Table:
    """Return an arm's differences from its optimizer alone in every measure."""
    base = ARMS[arm].base
    made = terminal.table(f"{ARMS[arm].label} minus {ARMS[base].label}, every measure", ["measure"], runs.tasks)
    for measure in runs.measures:
        found = {c.task: c for c in runs.compare(arm, base, measure)}
        cells = [f"{difference(c)}\np {c.p:.2g}" if (c := found.get(task)) else "-" for task in runs.tasks]
        made.add_row(measure, *cells)
    return made


def all_tables(document: Mapping[str, Any]) -> list[terminal.Table]:
    """Return the tables of a document; none before two seeds can be compared."""
    runs = Runs(document)
    if not any(runs.compare(name, ARMS[name].base) for name in runs.setting.arms):
        return []
    ours = [name for name in runs.setting.arms if ARMS[name].agr_on]
    return [levels(runs), verdicts(runs, own=False), verdicts(runs, own=True), *(by_measure(runs, a) for a in ours)]
