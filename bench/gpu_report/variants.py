"""Times a step in variants that differ in environment variables alone; they take turns, as in the step benchmark.

The cuda backend reads such variables when it makes a launch, which is when an optimizer steps for the first time. So
every variant has an optimizer of its own, over the same parameters, gradients and state, and its variables are set for
as long as it steps. The first variant is the one that the others are compared with.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import agr_cuda
from bench.commands import options
from bench.measuring import clocks, machine, races
from bench.measuring.clocks import CopyProbe
from bench.measuring.races import Lane
from bench.measuring.stats import Interval, Summary, median_interval, paired_ratios, summarize
from bench.reporting import documents, terminal
from bench.workloads.building import LEARNING_RATE
from bench.workloads.formats import ACCESSES
from bench.workloads.shapes import model_set
from bench.workloads.tensors import Workload

Variables = Mapping[str, str | None]  # of the environment; None: not set
Variants = Mapping[str, Variables]  # by what they are called
Row = dict[str, Any]  # what is shown of a variant: its name, a cell for each case, and what comes of them


@dataclass(frozen=True)
class Case:
    """A step that every variant takes."""

    name: str
    set: str  # of tensors, as bench.workloads.shapes names it
    rule: str = "AdamW"  # the optimizer's name in agr_cuda
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)  # the optimizer's
    steps: int = 1  # that are timed as one: a step of few microseconds is hardly longer than a GPU's clock can tell


@dataclass(frozen=True)
class Result:
    """One variant of one case."""

    case: str
    variant: str
    step_s: Summary
    ratio: Summary  # to the first variant in the same round
    interval: Interval | None  # in which the ratio's median lies
    share_of_copy: float


class Environment:
    """Exchanges variables of the environment, and exchanges them back."""

    def __init__(self, variables: Variables) -> None:
        self._values = dict(variables)

    def swap(self) -> None:
        """Exchange the environment's values with ours."""
        before = {name: os.environ.get(name) for name in self._values}
        for name, value in self._values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._values = before


def repeated(step: Callable[[], object], times: int) -> Callable[[], object]:
    """Return what takes that many steps."""

    def take() -> None:
        for _ in range(times):
            step()

    return step if times == 1 else take


def measure(
    case: Case, variants: Variants, device: torch.device, seconds: float, probe: CopyProbe, rounds: int = 1000
) -> list[Result]:
    """Time one case in every variant, for that long or that many rounds."""
    clock, model = clocks.clock_for(device), model_set(case.set)
    workload = Workload(model.shapes, device, case.dtype)
    state: dict[torch.Tensor, Any] = {}
    lanes = []
    for name, variables in variants.items():
        optimizer = getattr(agr_cuda, case.rule)(
            workload.parameters, lr=LEARNING_RATE, backend=device.type, **case.options
        )
        optimizer.state.update({parameter: dict(values) for parameter, values in state.items()})
        swap = Environment(variables).swap
        lanes.append(Lane(name, repeated(optimizer.step, case.steps), swap, swap, repeats=1))
        for number in range(2):
            workload.turn(number)
            lanes[-1].visit(clock)
        state = optimizer.state
    probe.clear()
    probe()
    timings = races.race(lanes, clock, rounds=rounds, seconds=seconds, new_round=workload.turn, between=probe)
    copy = summarize(probe.samples).median
    steps = {name: [timing.step / case.steps for timing in taken] for name, taken in timings.items()}
    unit = steps[lanes[0].name]
    moved = ACCESSES[case.rule] * case.dtype.itemsize * model.elements
    results = []
    for name, taken in steps.items():
        step_s, ratios = summarize(taken), [step / one for step, one in zip(taken, unit, strict=True)]
        share = moved / step_s.median / copy
        results.append(Result(case.name, name, step_s, paired_ratios(taken, unit), median_interval(ratios), share))
    return results


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each variant, in the order of the cases."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.variant, []).append(result)
    return found


class Comparison:
    """A program that compares variants: it prints tables, and keeps its file up to date with what it has measured."""

    def __init__(self, args: argparse.Namespace, parts: Sequence[str]) -> None:
        self.device: torch.device = args.device
        self._path: Path = args.out
        self._probe = CopyProbe(self.device, args.copy_mebibytes)
        self._console = terminal.console()
        nothing: dict[str, Any] = {part: {"results": [], "rows": []} for part in parts}
        self._document = {"format": 2, "machine": machine.describe(self.device), **nothing}

    def measure(
        self,
        part: str,
        cases: Sequence[Case],
        variants: Variants,
        seconds: float,
        rows: Callable[[Sequence[Result]], list[Row]],
        title: str,
    ) -> list[Result]:
        """Time every case for that long, and show the rows that `rows` makes of the results."""
        found: list[Result] = []
        for case in cases:
            found += measure(case, variants, self.device, seconds, self._probe)
            shown = rows(found)
            self._document[part] = {"results": [asdict(result) for result in found], "rows": shown}
            documents.write(self._path, self._document)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        table = terminal.table(title, ["variant"], [*shown[0]["cases"], "result"])
        for row in shown:
            table.add_row(row["variant"], *row["cases"].values(), row["result"])
        self._console.print(table)
        return found


def add_arguments(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Add the options of a program that compares variants."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=options.device, default=default_device, help="cpu tries the program itself out"
    )
    parser.add_argument(
        "--seconds", type=options.positive_float, default=seconds, help=f"of each case (default: {seconds:g})"
    )
    parser.add_argument("--copy-mebibytes", type=options.positive_int, default=1024, metavar="MIB")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
