"""Tables of a run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from bench.reporting.results import Row, SetResult
from bench.reporting.targets import Target
from bench.reporting.terminal import Table, Text, table
from bench.reporting.units import duration, span, times
from bench.workloads.contenders import Choice

VERDICT_STYLES = {"met": "green", "missed": "red", "not measured": "dim"}


def _cells(row: Row, with_host: bool) -> list[str]:
    figures = row.figures
    if figures is None:
        return [row.label, row.status]
    host = [duration(figures.host_s.median), times(figures.host_ratio.median)] if with_host else []
    return [
        row.label,
        duration(figures.step_s.median),
        span(figures.step_s),
        str(figures.step_s.count),
        times(figures.ratio.median),
        f"{figures.ratio.lower:.2f} - {figures.ratio.upper:.2f}",
        times(figures.ratio_of_fastest),
        *host,
        f"{figures.bytes_per_element:.4g}",
        times(figures.ratio_per_byte),
        f"{figures.bytes_per_second / 1e9:.2f}",
        f"{100 * figures.share_of_copy:.0f}%",
    ]


def results_table(result: SetResult, with_host: bool) -> Table:
    """Return one model set's table: a contender a row."""
    others = "" if result.other_work is None else f"Other work took {100 * result.other_work:.0f}% of the processors."
    title = f"{result.title}: {result.tensors} tensors, {result.elements:,} elements"
    caption = f"Copy bandwidth: {result.copy.median / 1e9:.2f} GB/s (median of {result.copy.count}). {others}"
    host = ("host", "host ratio") if with_host else ()
    ratio = ("ratio", "quartiles", "of fastest")
    numbers = ("step", "quartiles", "rounds", *ratio, *host, "bytes", "a byte", "GB/s", "of copy")
    made = table(title, ["contender"], numbers, caption)
    for row in result.rows:
        style = "bold" if row.ours else None if row.figures else "dim"
        made.add_row(*_cells(row, with_host), style=style)
    return made


def reasons(result: SetResult) -> list[str]:
    """Return why contenders were not measured, a line each."""
    return [f"{row.label}: {row.reason}" for row in result.rows if row.figures is None]


def left_out(choice: Choice) -> list[str]:
    """Return which contenders are not measured at all, a line for each reason."""
    return [f"Not measured, {reason}: {', '.join(names)}." for reason, names in choice.left_out.items()]


def targets_table(targets: Sequence[Target]) -> Table:
    """Return the design's targets with what was measured."""
    made = Table(title="Targets", title_justify="left")
    made.add_column("target")
    for heading in ("limit", "measured", "by the fastest"):
        made.add_column(heading, justify="right")
    made.add_column("verdict")
    for target in targets:
        style = next(style for word, style in VERDICT_STYLES.items() if target.verdict.startswith(word))
        measured, fastest = target.show(target.measured), target.show(target.at_fastest)
        made.add_row(target.text, target.shown_limit, measured, fastest, Text(target.verdict, style))
    return made


def legend(with_host: bool) -> str:
    """Return what the columns mean."""
    lines = ["step: median time of one step()" + (" on the device, its work queued ahead." if with_host else ".")]
    if with_host:
        lines.append("host: time until step() returned, begun on an idle device.")
    copied = "of copy: share of the bandwidth of copy_ on large float32 tensors, measured between rounds."
    if not with_host:
        copied += "\n  A CPU's copy may also read the lines it writes (12 bytes, not 8): a step can exceed 100%."
    lines += [
        "ratio: to torch's fused AdamW in the same round, median over the rounds: drift of a shared machine",
        "  cancels in each pair. of fastest: each contender's fastest step to the yardstick's fastest; where",
        "  it differs much from the ratio, other work was disturbing the run.",
        "bytes: of an element that the rule must move as its numbers are stored (float32: AdamW 28, Adan 44,",
        "  gradients alone 8). a byte: the ratio of the times for each of those bytes.",
        "GB/s: those bytes over the median time.",
        copied,
    ]
    if with_host:
        lines.append("  A set that fits into the GPU's cache is measured in it, and any contender can exceed 100%.")
    return "\n".join(lines)
