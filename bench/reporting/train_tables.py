"""The tables of `python -m bench train`: what finished runs say, for the terminal and for the documentation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.reporting import terminal
from bench.training.analysis import FINAL, LEVEL, Comparison, Runs
from bench.training.arms import ARMS

ROUNDING = 1e-9  # of sums of differences that cancel
TASKS = {"gpt": "GPT", "resnet": "ResNet", "vit": "ViT", "ddpm": "DDPM"}


@dataclass(frozen=True)
class Grid:
    """A table's texts, of which the first column names the rows."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def shown(self) -> terminal.Table:
        """Return it for the terminal."""
        made = terminal.table(self.title, self.headings[:1], self.headings[1:])
        for row in self.rows:
            made.add_row(*row)
        return made


def signed_percent(value: float) -> str:
    """Return a share in percent with two digits that count, and a sign."""
    if not value:
        return "0%"
    digits = max(0, 1 - math.floor(math.log10(abs(100 * value))))
    return f"{100 * value:+.{digits}f}%"


def _number(value: float) -> str:
    return f"{value:+.2g}" if abs(value) > ROUNDING else "0"


def difference(comparison: Comparison) -> str:
    """Return a mean difference and its interval."""
    form: Callable[[float], str] = signed_percent if comparison.relative else _number
    return f"{form(comparison.difference)} ({form(comparison.lower)} to {form(comparison.upper)})"


def _pairs(runs: Runs, comparison: Comparison) -> str:
    """Return how many pairs there are, where some diverged or were not run: those that are left are a selection."""
    wanted = len(runs.seeds)
    return f", {comparison.pairs} of {wanted} pairs" if comparison.pairs < wanted else ""


def _by_task(runs: Runs, found: Sequence[Comparison], cell: Callable[[Comparison], str]) -> list[str]:
    """Return a cell for each task; a dash where there is nothing to compare."""
    of_task = {comparison.task: comparison for comparison in found}
    return [cell(of_task[task]) if task in of_task else "-" for task in runs.tasks]


def _headings(runs: Runs, first: str) -> list[str]:
    return [first, *(TASKS[task] for task in runs.tasks)]


def levels(runs: Runs) -> Grid:
    """Return what every arm ends with, at what was chosen for itself."""

    def cell(name: str, task: str) -> str:
        values = [*runs.values(task, name, FINAL, own=True).values()]
        point, gone = runs.point(task, name, own=True), runs.diverged(task, name, own=True)
        if len(values) < 2:
            return f"{gone} diverged" if gone else "-"
        shown = (
            f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.2g} ({point.lr:.2g}, {point.weight_decay:g})"
        )
        return f"{shown}, {gone} diverged" if gone else shown

    rows = [(ARMS[name].label, *(cell(name, task) for task in runs.tasks)) for name in runs.setting.arms]
    title = f"{FINAL}, mean and standard deviation over seeds (learning rate, weight decay: those chosen for the arm)"
    return Grid(title, _headings(runs, "arm"), rows)


def _others(runs: Runs) -> list[str]:
    return [name for name in runs.setting.arms if name != ARMS[name].base]


def verdicts(runs: Runs, own: bool = False) -> Grid:
    """Return each arm's difference from its optimizer alone, and the verdict."""

    def cell(c: Comparison) -> str:
        return f"{difference(c)}{_pairs(runs, c)}, {c.verdict}"

    names = [name for name in _others(runs) if ARMS[name].searches] if own else _others(runs)
    rows = [(ARMS[name].label, *_by_task(runs, runs.compare(name, ARMS[name].base, own=own), cell)) for name in names]
    if own:
        for name in _with_agr(runs):
            base = ARMS[name].base
            found = _by_task(runs, runs.compare(name, base, both_own=True), cell)
            rows.append((f"{ARMS[name].label}, beside {ARMS[base].label} with the same", *found))
    how = "each with what was chosen for itself" if own else "both with what was chosen for the optimizer alone"
    return Grid(f"change of the {FINAL}, {how}: mean, 95% interval, verdict", _headings(runs, "arm"), rows)


def detectable(runs: Runs) -> Grid:
    """Return the effect that the test would have found with a probability of 80%."""
    rows = [
        (
            ARMS[name].label,
            *_by_task(runs, runs.compare(name, ARMS[name].base), lambda c: signed_percent(c.detectable).lstrip("+")),
        )
        for name in _others(runs)
    ]
    return Grid(f"change of the {FINAL} that would be found in 80 of 100 cases", _headings(runs, "arm"), rows)


def beside_placebo(runs: Runs) -> Grid:
    """Return the difference of AGR from its placebo."""
    rows = [
        (
            f"{ARMS[name].label} minus placebo",
            *_by_task(
                runs,
                runs.compare(name, f"{ARMS[name].base}-placebo"),
                lambda c: f"{difference(c)}{_pairs(runs, c)}, p {c.p:.2g}",
            ),
        )
        for name in _with_agr(runs)
        if f"{ARMS[name].base}-placebo" in runs.setting.arms
    ]
    return Grid(f"AGR's {FINAL} beside the placebo's", _headings(runs, ""), rows)


def _with_agr(runs: Runs) -> list[str]:
    return [name for name in runs.setting.arms if name in ("agr-adamw", "agr-adan")]


def spreads(runs: Runs) -> Grid:
    """Return how much the final held-out loss differs over seeds, and over pairs of runs with the same seed."""
    rows: list[list[str]] = []
    for base in dict.fromkeys(ARMS[name].base for name in runs.setting.arms):
        cells = []
        for task in runs.tasks:
            values = [*runs.values(task, base, FINAL).values()]
            cells.append(
                signed_percent(statistics.stdev(values) / statistics.fmean(values)).lstrip("+")
                if len(values) > 1
                else "-"
            )
        rows.append([f"{ARMS[base].label}, over seeds", *cells])
        for name in (f"{base}-bit", f"{base}-placebo", f"agr-{base}"):
            if name in runs.setting.arms:
                found = _by_task(runs, runs.compare(name, base), lambda c: signed_percent(c.spread).lstrip("+"))
                rows.append([f"{ARMS[name].label}, over pairs", *found])
    return Grid("standard deviation, as a share of the loss", _headings(runs, ""), rows)


def by_measure(runs: Runs, arm: str) -> Grid:
    """Return an arm's differences from its optimizer alone in every measure."""

    def cell(c: Comparison) -> str:
        return f"{difference(c)}{', p ' + format(c.p, '.2g') if c.p < LEVEL else ''}"

    base = ARMS[arm].base
    rows = [(measure, *_by_task(runs, runs.compare(arm, base, measure), cell)) for measure in runs.measures]
    title = f"{ARMS[arm].label} minus {ARMS[base].label}, every measure: mean, 95% interval, p where below {LEVEL}"
    return Grid(title, _headings(runs, "measure"), rows)


def repeats(runs: Runs) -> Grid:
    """Return each set's verdict, once where all sets have the same."""

    def cell(name: str, task: str) -> str:
        found = [
            next((c.verdict for c in runs.compare(name, ARMS[name].base, first=first) if c.task == task), "-")
            for first in runs.setting.sets
        ]
        return found[0] if len(set(found)) == 1 else " / ".join(found)

    rows = [(ARMS[name].label, *(cell(name, task) for task in runs.tasks)) for name in _others(runs)]
    return Grid("verdicts of each set of seeds alone", _headings(runs, "arm"), rows)


def all_grids(document: Mapping[str, Any]) -> list[Grid]:
    """Return the tables of a document; none before two seeds can be compared."""
    runs = Runs(document)
    if not any(runs.compare(name, ARMS[name].base) for name in _others(runs)):
        return []
    measures = [by_measure(runs, name) for name in _with_agr(runs)]
    several = [repeats(runs)] if len(runs.setting.sets) > 1 else []
    found = [levels(runs), verdicts(runs), verdicts(runs, own=True), detectable(runs), beside_placebo(runs)]
    return [*found, spreads(runs), *measures, *several]
