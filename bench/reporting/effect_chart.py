"""The picture of `python -m bench effect`: on which tensors AGR does anything, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from bench.reporting.effect_rows import EffectRow

COLORS = {"matrix": "#004c7f", "embedding": "#3c7a3a", "norm": "#f0a050", "bias": "#b03a00"}
MARKERS = ("o", "s", "^", "D")
PER_CENT = 0.01


def figure(run: Mapping[str, Any]) -> Figure:
    """Return a panel for each rule: the change of a tensor's update by its number of elements."""
    rows = [EffectRow(**row) for row in run["rows"]]
    rules = list(dict.fromkeys(row.rule for row in rows))
    tasks = list(dict.fromkeys(row.task for row in rows))
    made = Figure(figsize=(5.2 * len(rules), 4.2), dpi=100, layout="constrained")
    panels = made.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for panel, rule in zip(panels, rules, strict=True):
        for task, marker in zip(tasks, MARKERS, strict=False):
            for kind, color in COLORS.items():
                of_kind = [
                    row for row in rows if (row.rule, row.task, row.kind, row.scope) == (rule, task, kind, "tensor")
                ]
                sizes, changes = [row.elements for row in of_kind], [row.change for row in of_kind]
                panel.scatter(sizes, changes, s=20, color=color, marker=marker, linewidths=0, alpha=0.85)
        panel.axhline(PER_CENT, color="#a3a3a3", linewidth=0.8)
        panel.set(
            xscale="log", yscale="log", title=f"{rule}: what AGR changes of an update", xlabel="elements of the tensor"
        )
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("||with - without|| / ||without||")
    for kind, color in COLORS.items():
        panels[0].scatter([], [], s=20, color=color, label=kind)
    for task, marker in zip(tasks, MARKERS, strict=False):
        panels[0].scatter([], [], s=20, color="#606060", marker=marker, label=task)
    panels[0].legend(fontsize=8)
    return made
