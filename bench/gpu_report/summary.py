"""The summary of a GPU report, as Markdown: short enough to be read where only the end of an output is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu_report.runner import Outcome

TAIL_SHOWN = 8  # lines of a failed stage's output
LONGEST_LINE = 300


def targets(outcomes: Sequence[Outcome]) -> list[Mapping[str, Any]]:
    """Return the design's targets with what was measured."""
    return [target for outcome in outcomes for target in outcome.figures.get("targets", ())]


def render(device: str, outcomes: Sequence[Outcome], seconds: float, files: Sequence[str]) -> str:
    """Return the summary of the stages so far."""
    lines = [f"# GPU report: {device}", ""]
    lines += ["| stage | result | seconds |", "| --- | --- | --- |"]
    for outcome in outcomes:
        result = f"**{outcome.status}**" if outcome.status == "failed" else outcome.status
        reason = f": {outcome.reason}" if outcome.reason else ""
        lines.append(f"| {outcome.name} | {result}{reason} | {outcome.seconds:.0f} |")
    lines.append(f"| all | | {seconds:.0f} |")
    for outcome in outcomes:
        if outcome.lines:
            lines += ["", f"## {outcome.name}", "", *outcome.lines]
        if outcome.tail:
            shown = [line[:LONGEST_LINE] for line in outcome.tail[-TAIL_SHOWN:]]
            lines += ["", f"The end of what {outcome.name} printed:", "", "```", *shown, "```"]
    judged = targets(outcomes)
    if judged:
        lines += ["", "## targets", "", "| target | limit | measured | verdict |", "| --- | --- | --- | --- |"]
        for target in judged:
            shown_target = target["shown"]
            cells = (target["text"], shown_target["limit"], shown_target["measured"], target["verdict"])
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Files: {', '.join(files)}"]
    return "\n".join(lines) + "\n"
