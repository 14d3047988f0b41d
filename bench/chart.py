"""The bar chart of a run: one panel a model set, one bar a contender."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.contenders import YARDSTICK
from bench.report import duration, times
from bench.results import SetResult

# (rule, ours): ours saturated, peers pale
COLORS = {
    ("AdamW", True): "#1f5fa8",
    ("AdamW", False): "#a9c6e6",
    ("Adan", True): "#c2571a",
    ("Adan", False): "#f2c4a0",
}
COLUMNS = 3
PANEL_WIDTH, ROW_HEIGHT = 4.6, 0.31  # inches


def _panel(axes: Axes, result: SetResult) -> None:
    """Bars of median milliseconds, whiskers from quartile to quartile, labels with time and ratio."""
    largest = max((row.figures.step_s.median for row in result.rows if row.figures), default=1.0)
    beside: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 0), "va": "center", "size": 8}
    for place, row in enumerate(result.rows):
        if row.figures is None:
            axes.annotate(row.status, (0, place), color="0.5", **beside)
            continue
        step = row.figures.step_s
        whisker = [[(step.median - step.lower) * 1e3], [(step.upper - step.median) * 1e3]]
        axes.barh(
            place,
            step.median * 1e3,
            height=0.72,
            color=COLORS[row.rule, row.ours],
            xerr=whisker,
            error_kw={"ecolor": "0.25", "elinewidth": 0.9},
        )
        text = f"{duration(step.median)}  ({times(row.figures.ratio.median)})"
        axes.annotate(text, (min(step.upper, 1.25 * largest) * 1e3, place), **beside)
    yardstick = result.figures(YARDSTICK)
    if yardstick:
        axes.axvline(yardstick.step_s.median * 1e3, color="0.35", linestyle=":", linewidth=1.0, zorder=0)
    axes.set_xlim(0, 1.6 * largest * 1e3)
    axes.set_title(
        f"{result.title}\n{result.elements:,} elements in {result.tensors} tensors", size=10, loc="left"
    )
    axes.set_xlabel("milliseconds a step", size=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def write_chart(path: Path, results: Sequence[SetResult], subtitle: str) -> None:
    """Write the chart as PNG; `subtitle` says on what it was measured."""
    columns = min(COLUMNS, len(results))
    lines = ceil(len(results) / columns)
    rows = max(len(result.rows) for result in results)
    size = (2.6 + PANEL_WIDTH * columns, 1.3 + lines * (1.1 + ROW_HEIGHT * rows))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place < len(results):
            _panel(axes, results[place])
        else:
            axes.set_visible(False)
    grid[0, 0].set_yticks(range(rows), [row.label for row in results[0].rows])
    grid[0, 0].set_ylim(rows - 0.4, -0.6)
    names = {True: "agr_cuda", False: "others"}
    handles = [Patch(color=color, label=f"{rule}, {names[ours]}") for (rule, ours), color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        "One optimizer step: median, quartiles as whiskers, ratio to torch's fused AdamW (dotted)\n"
        + subtitle,
        size=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
