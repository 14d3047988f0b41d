"""The table of `python -m bench memory`."""

from __future__ import annotations

from typing import Any

from bench.figures.registry import block
from bench.reporting.markdown import table

SHOWN = "gpt2"
PHASES = ("parameters", "gradients", "state", "step", "peak")


def _rounded(value: float) -> str:
    """Return three digits. A few bytes in all are none an element."""
    return f"{value:.3g}" if value >= 0.005 else "0"


@block("memory", "memory-cpu-2-cores")
def memory(run: dict[str, Any]) -> list[str]:
    """Return bytes an element of those that step, which is all but what changes gradients alone."""
    rows = []
    for row in run["rows"]:
        if row["set"] != SHOWN or not row["held"]:
            continue
        cells = {phase: _rounded(row["held"][phase] / row["elements"]) for phase in PHASES}
        if cells["state"] != "0":
            rows.append((f"**{row['label']}**" if row["ours"] else row["label"], *cells.values()))
    return table(("bytes an element", *PHASES), rows)
