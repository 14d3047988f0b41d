"""The picture of `python -m bench train`: what each arm changes of the final held-out loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from bench.reporting.train_tables import TASKS
from bench.training.analysis import Runs
from bench.training.arms import ARMS
from bench.training.settings import SMALLEST_OF_INTEREST

COLORS = ("#004c7f", "#f0a050", "#3c7a3a", "#b03a00")  # of the sets of seeds
APART = 0.25  # rows between the sets
#: The axis is linear up to this many percent, logarithmic beyond it: what AGR changes spans four orders of magnitude.
LINEAR = 0.01


def figure(run: Mapping[str, Any]) -> Figure:
    """Return a panel for each task: mean differences from the optimizer alone with their intervals, set by set."""
    runs = Runs(run)
    names = [name for name in runs.setting.arms if name != ARMS[name].base]
    made = Figure(figsize=(3.4 * len(runs.tasks) + 1.6, 0.36 * len(names) + 1.6), dpi=100, layout="constrained")
    panels = made.subplots(1, len(runs.tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, runs.tasks, strict=True):
        interest = 100 * SMALLEST_OF_INTEREST
        panel.axvspan(-interest, interest, color="#e8e8e8", zorder=0)
        panel.axvline(0, color="#606060", linewidth=0.8)
        for place, (first, color) in enumerate(zip(runs.setting.sets, COLORS, strict=False)):
            shift = APART * (place - (len(runs.setting.sets) - 1) / 2)
            for row, name in enumerate(names):
                for c in runs.compare(name, ARMS[name].base, first=first):
                    if c.task == task:
                        ends = [100 * c.lower, 100 * c.upper]
                        panel.plot(ends, [row + shift] * 2, color=color, linewidth=1.4)
                        panel.plot([100 * c.difference], [row + shift], "o", color=color, markersize=3.5)
        panel.set_xscale("symlog", linthresh=LINEAR)
        panel.set(title=TASKS[task], xlabel="% of the loss")
        panel.tick_params(axis="x", labelsize=7, rotation=60)
        panel.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(names)), [ARMS[name].label for name in names])
    panels[0].invert_yaxis()
    for first, color in zip(runs.setting.sets, COLORS, strict=False):
        panels[0].plot([], [], color=color, label=f"seeds from {first}")
    made.legend(fontsize=8, loc="outside lower center", ncols=len(runs.setting.sets))
    made.suptitle("Change of the final held-out loss beside the optimizer alone: mean and 95% interval", fontsize=10)
    return made
