"""Time a step without each tactic of the CUDA kernel: `python -m bench.gpu_report.tactics --out FILE.json`.

A tactic is something that the kernel does for speed and could do without. The cuda backend leaves out of a launch
those that AGR_CUDA_WITHOUT names when the launch is made. First each is left out alone, and judged by `verdict`; then
all that are not worth their code are left out together, since of two that hide the same latency each alone seems to do
nothing. The control leaves out nothing, as does the variant that all are compared with: what it differs by is not the
tactics' doing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Literal

import torch

from agr_cuda.native import native
from bench.gpu_report import variants
from bench.gpu_report.variants import Case, Comparison, Result, Row, Variants
from bench.measuring.stats import Interval
from bench.reporting.units import duration

VARIABLE = "AGR_CUDA_WITHOUT"
ALL, CONTROL = "none", "none (control)"  # the variants that leave out nothing
MARGIN = 0.01  # of the time: less is no reason to keep code, nor to take it out

# The most telling first, if time should run out.
CASES = {
    case.name: case
    for case in (
        Case("gpt2", "gpt2"),
        Case("321x64", "321x64", steps=10),
        Case("gpt2-bfloat16-clipped", "gpt2", dtype=torch.bfloat16, options={"max_grad_norm": 1.0}),
        Case("gpt2-adan", "gpt2", rule="Adan"),
        Case("321x4096", "321x4096", steps=10),
        Case("4x33554432", "4x33554432"),  # thousands of chunks a tensor
    )
}

Verdict = Literal["keep", "drop", "mixed", "no difference", "unclear"]
NOT_WORTH_IT = ("drop", "no difference")  # what makes no difference goes: less code is better


def names() -> tuple[str, ...]:
    """Return the names of all tactics."""
    return tuple(native().cuda_tactics)


def verdict(intervals: Sequence[Interval | None]) -> Verdict:
    """Judge a tactic by the ratio of the times without and with it, of which each case has an interval.

    keep: without it some case is slower by more than MARGIN, and none is faster by more than that; drop: the other way
    round; mixed: there are both. A whole interval must lie beyond the margin for that. If there is neither, it makes no
    difference where all intervals lie within the margins; where one does not, or is missing, that is unclear.
    """
    known = [interval for interval in intervals if interval is not None]
    slower = any(interval.lower > 1 + MARGIN for interval in known)
    faster = any(interval.upper < 1 - MARGIN for interval in known)
    if slower or faster:
        return "mixed" if slower and faster else "keep" if slower else "drop"
    within = all(interval.lower >= 1 - MARGIN and interval.upper <= 1 + MARGIN for interval in known)
    return "no difference" if within and len(known) == len(intervals) else "unclear"


def without(*groups: Sequence[str]) -> Variants:
    """Return the variants that leave out nothing, nothing again, and each of the groups of tactics."""
    named = {", ".join(group): {VARIABLE: ",".join(group)} for group in groups}
    return {ALL: {VARIABLE: None}, CONTROL: {VARIABLE: None}, **named}


def judged(results: Sequence[Result], cases: Sequence[str]) -> list[Row]:
    """Return what is shown of each variant. Cases that are not measured yet leave a verdict unclear.

    Of the step with all tactics that is its time and its share of the copy bandwidth; of the others, the ratio to it
    with its interval.
    """
    rows: list[Row] = []
    for name, found in variants.by_variant(results).items():
        measured = {result.case: result for result in found}
        cells = dict.fromkeys(cases, "-")
        for case, result in measured.items():
            interval = f" ({result.interval.lower:.3f}-{result.interval.upper:.3f})" if result.interval else ""
            cells[case] = f"{result.ratio.median:.3f}{interval}"
            if name == ALL:
                cells[case] = f"{duration(result.step_s.median)} {result.share_of_copy:.0%}"
        intervals = [measured[case].interval if case in measured else None for case in cases]
        rows.append({"variant": name, "cases": cells, "result": "" if name == ALL else verdict(intervals)})
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report.tactics", description=__doc__)
    variants.add_arguments(parser, seconds=5.0)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[*CASES], metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--tactics", nargs="+", metavar="NAME", help="leave out these alone (default: every one)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Time, judge, print tables and write the figures as JSON."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    tactics = args.tactics or names()
    if unknown := sorted(set(tactics) - set(names())):
        parser.error(f"unknown tactics {', '.join(unknown)}: there are {', '.join(names())}")
    cases = [CASES[name] for name in args.cases]
    comparison = Comparison(args, ("alone", "together"))

    def rows(results: Sequence[Result]) -> list[Row]:
        return judged(results, args.cases)

    def measure(part: str, tried: Variants, seconds: float, title: str) -> list[Result]:
        return comparison.measure(part, cases, tried, seconds, rows, title)

    title = "A step without each tactic: ratio to the time with all of them, and its interval"
    found = rows(measure("alone", without(*((name,) for name in tactics)), args.seconds, title))
    not_worth_it = [row["variant"] for row in found if row["variant"] in tactics and row["result"] in NOT_WORTH_IT]
    if len(not_worth_it) > 1:
        measure("together", without(not_worth_it), args.seconds / 3, "Without all that are not worth it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
