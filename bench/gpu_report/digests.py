"""What the summary tells of the files that the GPU report's stages leave."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

from bench.gpu_report.runner import Digest
from bench.reporting.markdown import table

SHOWN_FAILURES = 5  # of tests
LONGEST_REASON = 300  # characters of why a contender was not measured
SHOWN_SETTINGS = 8  # the fastest of the tunables' sweep


def junit(path: Path) -> Digest:
    """Read pytest's report."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    counts = {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped}
    line = ", ".join(f"{count} {word}" for word, count in counts.items())
    more = [f"... and {len(names) - SHOWN_FAILURES} more"] if len(names) > SHOWN_FAILURES else []
    problem = "" if counts["passed"] else "no test ran"
    return Digest([line, *names[:SHOWN_FAILURES], *more], {**counts, "failures": names}, problem)


def stopped_tests(output: str) -> Digest:
    """Count what `pytest -v` printed before it was stopped."""
    results = re.findall(r"^(?=.*::).*\b(PASSED|FAILED|ERROR|SKIPPED)\b.*$", output, re.MULTILINE)
    counts = {word.lower(): results.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    line = ", ".join(f"{count} {word}" for word, count in counts.items())
    return Digest([f"so far {line}"], counts, "pytest wrote no report")


def read_all(folder: Path, pattern: str) -> dict[str, Any]:
    """Return the JSON documents of that name, those of float32 first, as the summary shows them."""
    paths = sorted(folder.glob(pattern), key=lambda path: ("float32" not in path.name, path.name))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def training_table(document: Mapping[str, Any]) -> list[str]:
    """Return what each arm changed of AdamW's or Adan's final held-out loss, over the seeds that both have."""
    final: dict[tuple[str, str], dict[int, float]] = {}
    for run in document["runs"]:
        if run["judged"] and run["held_out"][-1] is not None:
            final.setdefault((run["task"], run["arm"]), {})[run["seed"]] = run["held_out"][-1]
    rows = []
    for (task, arm), losses in final.items():
        base = "adan" if "adan" in arm else "adamw"  # not from bench.training, which needs what is yet to be built
        others = final.get((task, base), {})
        changes = [losses[seed] / others[seed] - 1 for seed in losses.keys() & others.keys()]
        if len(changes) > 1:
            change = "" if arm == base else f"{100 * fmean(changes):+.3f}% ± {100 * stdev(changes):.3f}%"
            rows.append([task, arm, str(len(changes)), f"{fmean(losses.values()):.4f}", change])
    whole = "complete" if document["complete"] else "stopped at its time: `python -m bench train` goes on"
    headings = ["task", "arm", "seeds", "final held-out loss", "change, mean and standard deviation over seeds"]
    return [f"{len(document['runs'])} runs, {whole}", *table(headings, rows)]


def medians(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the medians of a step benchmark."""
    return {
        entry["name"]: {
            "copy_bytes_per_second": entry["copy"]["median"],
            "rows": {
                row["name"]: {
                    "step_s": row["figures"]["step_s"]["median"],
                    "host_s": row["figures"]["host_s"]["median"],
                    "ratio": row["figures"]["ratio"]["median"],
                    "share_of_copy": row["figures"]["share_of_copy"],
                    "kernels": row["figures"]["kernels"],
                }
                if row["figures"]
                else {"status": row["status"], "reason": row["reason"]}
                for row in entry["rows"]
            },
        }
        for entry in document["sets"]
    }


def shortened(reason: str) -> str:
    """Return a reason in one line, without the middle of a long one: compilers begin with where and end with what."""
    line = " ".join(reason.split())
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON // 2]} ... {line[-LONGEST_REASON // 2 :]}"


def step_table(document: Mapping[str, Any]) -> list[str]:
    """Return a Markdown table: a contender a row, a set a column; below it, once each, why some were not measured.

    A contender that was measured on no set has no row.
    """
    sets = document["sets"]
    headings = [f"{entry['name']} ({entry['copy']['median'] / 1e12:.2f} TB/s)" for entry in sets]
    rows: list[list[str]] = []
    reasons: dict[str, list[str]] = {}  # with the sets that each is of
    for place, row in enumerate(sets[0]["rows"]):
        for entry in sets:
            if reason := entry["rows"][place]["reason"]:
                text = f"{row['name']}, {entry['rows'][place]['status']}: {shortened(reason)}"
                reasons.setdefault(text, []).append(entry["name"])
        if not any(entry["rows"][place]["figures"] for entry in sets):
            continue
        cells = [row["name"]]
        for entry in sets:
            figures = entry["rows"][place]["figures"]
            if figures is None:
                cells.append(entry["rows"][place]["status"])
                continue
            time, ratio = figures["step_s"]["median"] * 1e6, figures["ratio"]["median"]
            cells.append(f"{time:.0f} us {ratio:.2f}x {100 * figures['share_of_copy']:.0f}%")
        rows.append(cells)
    below = [f"{text} ({', '.join(names)})" if len(names) < len(sets) else text for text, names in reasons.items()]
    return [*table([document["settings"]["dtype"], *headings], rows), "", *below]


def precision_table(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table, a format of a contender a row, and below it why some were not measured."""
    rows: dict[str, list[str]] = {}
    reasons: list[str] = []
    for entry in (entry for document in documents for entry in document["sets"]):
        for row in entry["rows"]:
            figures = row["figures"]
            if figures is None:
                reasons.append(f"{row['name']}, {row['status']}: {shortened(row['reason'])}")
                continue
            time, ratio = f"{figures['step_s']['median'] * 1e6:.0f} us", f"{figures['ratio']['median']:.2f}x"
            moved, a_byte = f"{figures['bytes_per_element']:.4g}", f"{figures['ratio_per_byte']:.2f}x"
            # Of what is in several documents, as the yardstick is, the first is shown.
            rows.setdefault(row["name"], [time, moved, ratio, a_byte, f"{100 * figures['share_of_copy']:.0f}%"])
    headings = ["format", "step", "bytes an element", "ratio", "a byte", "of copy"]
    return [*table(headings, [(name, *cells) for name, cells in rows.items()]), "", *reasons]


def memory_table(document: Mapping[str, Any]) -> list[str]:
    """Return a Markdown table of bytes an element, a contender a row, and below it why some were not measured."""
    rows: list[tuple[str, ...]] = []
    reasons: list[str] = []
    for row in document["rows"]:
        if row["held"] is None:
            reasons.append(f"{row['name']}, {row['status']}: {shortened(row['reason'])}")
            continue
        counts = (row["held"][part] / row["elements"] for part in ("state", "rule", "step", "peak"))
        rows.append((row["name"], *(f"{count:.3f}" for count in counts)))
    return [*table(["bytes an element", "state", "by arithmetic", "a step", "peak"], rows), "", *reasons]


def sweep_table(document: Mapping[str, Any]) -> list[str]:
    """Return a Markdown table of shares of the copy bandwidth: a point a row, a contender a column."""
    names = [row["name"] for row in document["sets"][0]["rows"]]
    rows = [
        (
            f"{entry['tensors']} x {entry['elements'] // entry['tensors']}",
            *(f"{100 * row['figures']['share_of_copy']:.0f}%" if row["figures"] else "-" for row in entry["rows"]),
        )
        for entry in document["sets"]
    ]
    return table(["of copy", *names], rows)


def overhead_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a line an optimizer."""
    lines = []
    for row in document["rows"]:
        time, ratio = row["host_s"]["median"] * 1e6, row["ratio"]["median"]
        lines.append(f"- {row['label']}, {row['gradients']} gradients: {time:.1f} us, {ratio:.3f}x of torch's fused")
    return lines


def gradients_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a line a pattern: how long a step of each optimizer keeps the host as gradients come and go."""
    patterns: dict[str, list[str]] = {}
    for row in document["rows"]:
        time, ratio = row["host_s"]["median"] * 1e6, row["ratio"]["median"]
        patterns.setdefault(row["pattern"], []).append(f"{row['label']} {time:.1f} us ({ratio:.3f}x)")
    return [f"- {pattern}: {', '.join(cells)}" for pattern, cells in patterns.items()]


def variants_table(heading: str, rows: Sequence[Mapping[str, Any]], result: str) -> list[str]:
    """Return a Markdown table of what bench.gpu_report.variants has measured, or nothing if that is nothing."""
    if not rows:
        return []
    cells = [(row["variant"], *row["cases"].values(), row["result"]) for row in rows]
    return table([heading, *rows[0]["cases"], result], cells)


def tune_tables(sweep: Sequence[Mapping[str, Any]], together: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the fastest settings, and one of the best values together if they were tried."""
    default = [row for row in sweep[SHOWN_SETTINGS:] if row["variant"] == "default"]
    first = variants_table("one setting", [*sweep[:SHOWN_SETTINGS], *default], "average")
    second = variants_table("together", together, "average")
    return [*first, *([""] if second else []), *second]


def tactics_tables(alone: Sequence[Mapping[str, Any]], together: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how to read them, and a table of each tactic left out alone and one of those left out together."""
    how = (
        "The time of a step without a tactic of the kernel to that with all of them, and the interval of its median. "
        "What makes no difference is to be dropped, unless all that is to be dropped makes one together."
    )
    lines = [how]
    for heading, rows in (("without", alone), ("without these", together)):
        if rows:
            lines += ["", *variants_table(heading, rows, "verdict")]
    return lines
