"""The summary of a GPU report, as Markdown: short enough to be read where only the end of an output is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu_report.runner import Outcome
from bench.reporting.markdown import table

TAIL_SHOWN = 8  # lines of a failed stage's output
LONGEST_LINE = 300


def targets(outcomes: Sequence[Outcome]) -> list[Mapping[str, Any]]:
    """Return the design's targets with what was measured."""
    return [target for outcome in outcomes for target in outcome.figures.get("targets", ())]


def render(device: str, outcomes: Sequence[Outcome], seconds: float, files: Sequence[str]) -> str:
    """Return the summary of the stages so far."""
    lines = [f"# GPU report: {device}", ""]
    rows = []
    for outcome in outcomes:
        result = f"**{outcome.status}**" if outcome.status == "failed" else outcome.status
        reason = f": {outcome.reason}" if outcome.reason else ""
        rows.append((outcome.name, f"{result}{reason}", f"{outcome.seconds:.0f}"))
    lines += table(("stage", "result", "seconds"), [*rows, ("all", "", f"{seconds:.0f}")])
    for outcome in outcomes:
        if outcome.lines:
            lines += ["", f"## {outcome.name}", "", *outcome.lines]
        if outcome.tail:
            shown = [line[:LONGEST_LINE] for line in outcome.tail[-TAIL_SHOWN:]]
            lines += ["", f"The end of what {outcome.name} printed:", "", "```", *shown, "```"]
    judged = targets(outcomes)
    if judged:
        verdicts = [(t["text"], t["shown"]["limit"], t["shown"]["measured"], t["verdict"]) for t in judged]
        lines += ["", "## targets", "", *table(("target", "limit", "measured", "verdict"), verdicts)]
    lines += ["", f"Files: {', '.join(files)}"]
    return "\n".join(lines) + "\n"
