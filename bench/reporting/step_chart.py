"""The bar chart of a run of `step`: one panel a model set, one bar a contender."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.reporting.results import Row, SetResult, measured_on, sets_of
from bench.reporting.units import duration, times
from bench.workloads.contenders import YARDSTICK

# ours saturated, peers pale, the reference's plain operations grey
COLORS = {
    "AdamW, agr_cuda": "#1f5fa8",
    "AdamW, others": "#a9c6e6",
    "Adan, agr_cuda": "#c2571a",
    "Adan, others": "#f2c4a0",
    "gradients, agr_cuda": "#3c7a3a",
    "gradients, others": "#b7d7b0",
    "agr_cuda's reference backend: plain foreach": "#a3a3a3",
}
COLUMNS = 3
LONGEST_BAR = 6.0  # yardsticks; longer bars are cut there and hatched
PANEL_WIDTH, ROW_HEIGHT = 4.6, 0.31  # inches


def _kind(row: Row) -> str:
    """Return the key of a row's color."""
    if row.name.startswith("reference"):
        return "agr_cuda's reference backend: plain foreach"
    return f"{row.rule}, {'agr_cuda' if row.ours else 'others'}"


def _panel(axes: Axes, result: SetResult, unit: str) -> None:
    """Draw bars of median milliseconds with whiskers at the quartiles, labelled with time and ratio."""
    yardstick = result.figures(YARDSTICK)
    assert yardstick
    medians = [row.figures.step_s.median for row in result.rows if row.figures]
    longest = min(max(medians), LONGEST_BAR * yardstick.step_s.median) * 1e3
    beside: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 0), "va": "center", "size": 8}
    beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    for place, row in enumerate(result.rows):
        if row.figures is None:
            axes.annotate(row.status, (0, place), color="0.5", **beside)
            continue
        step, color = row.figures.step_s, COLORS[_kind(row)]
        lower, median, upper = (min(1e3 * seconds, longest) for seconds in (step.lower, step.median, step.upper))
        cut = 1e3 * step.median > longest
        axes.barh(place, median, height=0.72, color=color, hatch="//" if cut else None, edgecolor="white", linewidth=0)
        axes.plot([lower, upper], [place, place], color="0.25", linewidth=0.9)
        text = f"{duration(step.median)}  ({times(row.figures.ratio.median)})"
        axes.annotate(f">> {text}" if cut else text, (max(median, upper), place), **beside)
    axes.axvline(yardstick.step_s.median * 1e3, color="0.35", linestyle=":", linewidth=1.0, zorder=0)
    axes.set_xlim(0, 1.5 * longest)
    size = f"{result.elements:,} elements in {result.tensors} tensors"
    note = f"\nother work took {100 * (result.other_work or 0):.0f}% of the processors" if result.disturbed else ""
    axes.set_title(f"{result.title}\n{size}{note}", size=10, loc="left")
    axes.set_xlabel(f"milliseconds a step{unit}", size=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def figure(run: Mapping[str, Any]) -> Figure:
    """Return the chart of a run, whose title says on what it was measured."""
    results = sets_of(run)
    unit = " on the device" if run["machine"]["device"].startswith("cuda") else ""
    columns = min(COLUMNS, len(results))
    lines = ceil(len(results) / columns)
    rows = max(len(result.rows) for result in results)
    size = (2.6 + PANEL_WIDTH * columns, 1.3 + lines * (1.1 + ROW_HEIGHT * rows))
    made = Figure(figsize=size, dpi=130, layout="constrained")
    grid = made.subplots(lines, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place < len(results):
            _panel(axes, results[place], unit)
        else:
            axes.set_visible(False)
    grid[0, 0].set_yticks(range(rows), [row.label for row in results[0].rows])
    grid[0, 0].set_ylim(rows - 0.4, -0.6)
    handles = [Patch(facecolor=color, label=kind) for kind, color in COLORS.items()]
    handles.append(Patch(facecolor="0.8", hatch="//", edgecolor="white", label="longer than shown"))
    made.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    made.suptitle(
        "One optimizer step: median, line from quartile to quartile,\nratio to torch's fused AdamW (dotted)\n"
        + measured_on(run),
        size=11,
    )
    return made
