"""Tables of `python -m bench train`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.figures.registry import block
from bench.reporting import train_tables
from bench.reporting.markdown import table
from bench.reporting.train_tables import Grid
from bench.training.analysis import FINAL, Runs
from bench.training.arms import ARMS

FULL, DEMO = "train-full", "train-demo"


GRIDS: dict[str, Callable[[Runs], Grid]] = {
    "levels": train_tables.levels,
    "verdicts": train_tables.verdicts,
    "own": partial(train_tables.verdicts, own=True),
    "detectable": train_tables.detectable,
    "placebo": train_tables.beside_placebo,
    "spreads": train_tables.spreads,
    "repeats": train_tables.repeats,
    "agr-adamw": partial(train_tables.by_measure, arm="agr-adamw"),
    "agr-adan": partial(train_tables.by_measure, arm="agr-adan"),
}


def _lines(grid: Callable[[Runs], Grid], run: dict[str, Any]) -> list[str]:
    made = grid(Runs(run))
    return table(made.headings, made.rows)


for _name, _grid in GRIDS.items():
    block(f"train-{_name}", FULL)(partial(_lines, _grid))


@block("train-size", FULL)
def size(run: dict[str, Any]) -> str:
    judged = sum(record["judged"] for record in run["runs"])
    hours = run["seconds_of_all_runs"] / 3600
    return f"{len(run['runs']):,} runs, {judged:,} of them judged, {hours:.1f} hours of one thread"


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
