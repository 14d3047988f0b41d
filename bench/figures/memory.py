"""The table of `python -m bench memory`."""

from __future__ import annotations

from typing import Any

from bench.figures.registry import block
from bench.reporting.markdown import table

SHOWN = "gpt2"
PHASES = ("parameters", "gradients", "state", "step", "peak")


@block("memory", "memory-cpu-epyc-2-cores")
def memory(run: dict[str, Any]) -> list[str]:
    """Return bytes an element of those that step, which is all but what changes gradients alone."""
    rows = []
    for row in run["rows"]:
        if row["set"] != SHOWN or not (row["held"] and row["held"]["state"]):
            continue
        label = f"**{row['label']}**" if row["ours"] else row["label"]
        rows.append((label, *(f"{row['held'][phase] / row['elements']:.3g}" for phase in PHASES)))
    return table(("bytes an element", *PHASES), rows)
