"""The picture of `python -m bench sweep`: bytes a second by size, with the copy bandwidth as a roof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.reporting.results import Row, SetResult, measured_on, sets_of

# A rule's hue from dark to pale; ours are the dark ones.
OURS = {"AdamW": ("#1f5fa8", "#3f9fd8"), "Adan": ("#c2571a", "#e08a3c"), "gradients": ("#3c7a3a", "#5fae5c")}
PEERS = {
    "AdamW": ("#7fa3cc", "#6f8090", "#a08fd0", "#59b0b0", "#b0b8c0", "#8a6fa0"),
    "Adan": ("#e2a878", "#b08a70", "#d0b060", "#c08090"),
    "gradients": ("#9cc79a", "#b0b890"),
}
MARKERS = "osD^vPX*<>hp"


def styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return how the line of each row is drawn, by the row's name."""
    taken: dict[tuple[str, bool], int] = {}
    found: dict[str, dict[str, Any]] = {}
    for place, row in enumerate(rows):
        number = taken[row.rule, row.ours] = taken.get((row.rule, row.ours), -1) + 1
        colors = (OURS if row.ours else PEERS)[row.rule]
        found[row.name] = {
            "label": row.label,
            "color": colors[number % len(colors)],
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 5,
            "linewidth": 2.0 if row.ours else 1.1,
            "zorder": 3 if row.ours else 2,
        }
    return found


def _panel(axes: Axes, found: Sequence[SetResult], drawn: dict[str, dict[str, Any]], copy: float) -> None:
    """Draw a line a contender: gigabytes a second by the number of elements."""
    for name, style in drawn.items():
        measured = [(result.elements, figures) for result in found if (figures := result.figures(name))]
        elements = [count for count, _ in measured]
        axes.plot(elements, [figures.bytes_per_second / 1e9 for _, figures in measured], **style)
    axes.axhline(copy / 1e9, color="0.25", linestyle="--", linewidth=1.2, label="copy of large tensors", zorder=1)
    count = found[0].tensors
    axes.set(xscale="log", yscale="log", xlabel="elements of all tensors together")
    axes.set_title(f"{count:,} tensors" if count > 1 else "1 tensor", size=10, loc="left")
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def figure(run: Mapping[str, Any]) -> Figure:
    """Return a panel for each number of tensors; the title says on what it was measured."""
    found = sets_of(run)
    counts = list(dict.fromkeys(result.tensors for result in found))
    measured = {row.name: row for result in found for row in result.rows if row.figures}
    drawn, copy = styles(list(measured.values())), median(result.copy.median for result in found)
    made = Figure(figsize=(1.2 + 4.2 * len(counts), 5.6), dpi=110, layout="constrained")
    panels = made.subplots(1, len(counts), sharex=True, sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        _panel(axes, [result for result in found if result.tensors == count], drawn, copy)
    panels[0].set_ylabel("gigabytes a second that the rule must move")
    handles, labels = panels[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    made.suptitle(f"A step's bandwidth by size and number of tensors\n{measured_on(run)}", size=11)
    return made
