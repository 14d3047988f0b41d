"""Tables of `python -m bench train`."""

from __future__ import annotations

from typing import Any

from bench.figures.registry import block
from bench.reporting import train_tables
from bench.reporting.markdown import table
from bench.reporting.train_tables import Grid
from bench.training.analysis import FINAL, Runs
from bench.training.arms import ARMS

FULL, DEMO = "train-full", "train-demo"


def _lines(grid: Grid) -> list[str]:
    return table(grid.headings, grid.rows)


@block("train-size", FULL)
def size(run: dict[str, Any]) -> str:
    judged = sum(record["judged"] for record in run["runs"])
    hours = run["seconds_of_all_runs"] / 3600
    return f"{len(run['runs']):,} runs, {judged:,} of them judged, {hours:.1f} hours of one thread"


@block("train-levels", FULL)
def levels(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.levels(Runs(run)))


@block("train-verdicts", FULL)
def verdicts(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.verdicts(Runs(run)))


@block("train-own", FULL)
def own(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.verdicts(Runs(run), own=True))


@block("train-detectable", FULL)
def detectable(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.detectable(Runs(run)))


@block("train-placebo", FULL)
def placebo(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.beside_placebo(Runs(run)))


@block("train-spreads", FULL)
def spreads(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.spreads(Runs(run)))


@block("train-repeats", FULL)
def repeats(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.repeats(Runs(run)))


@block("train-agr-adamw", FULL)
def agr_adamw(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.by_measure(Runs(run), "agr-adamw"))


@block("train-agr-adan", FULL)
def agr_adan(run: dict[str, Any]) -> list[str]:
    return _lines(train_tables.by_measure(Runs(run), "agr-adan"))


@block("train-demo", DEMO)
def demo(run: dict[str, Any]) -> list[str]:
    """Return each arm's change, seed by seed."""
    runs = Runs(run)
    losses = {name: runs.values("gpt", name, FINAL) for name in runs.setting.arms}
    seeds = sorted(losses["adamw"])
    rows = [
        (ARMS[n].label, *(train_tables.signed_percent(losses[n][s] / losses[ARMS[n].base][s] - 1) for s in seeds))
        for n in losses
        if n != ARMS[n].base
    ]
    return table(("change of the final held-out loss", *(f"seed {seed}" for seed in seeds)), rows)
