"""Time step() where gradients come and go: which parameters have one changes from step to step.

So it is where layers are dropped or frozen in turn, where experts are chosen, or where two losses alternate. An
optimizer that prepares its work for one set of gradients has to prepare it anew then, or to remember several.

Optimizers share parameters and gradients, and take turns step by step in shuffled order. Gradients are kept: between
steps, outside the clock, they are set to None or back. agr_cuda chooses its backend. Every pattern has new optimizers,
whose first steps are not timed. On a GPU, steps begin on an idle device and are timed until step() returns.

Writes gradients-DEVICE-TAG.json into the output folder. Exit code 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch

from bench.commands import options
from bench.measuring import clocks, machine, races
from bench.measuring.races import Lane
from bench.measuring.stats import Summary, paired_ratios, summarize
from bench.reporting import documents, tables, terminal, units
from bench.reporting.targets import Target, stated_for
from bench.workloads.building import Builder, eps_for, optimizer
from bench.workloads.contenders import BY_NAME, YARDSTICK
from bench.workloads.tensors import Workload

UNTIMED = 20  # steps at first: of every pattern a whole number of periods
MOST_OF_FUSED = 1.0

OURS: dict[str, Builder] = {f"agr_cuda {rule}": optimizer("agr_cuda", rule) for rule in ("AdamW", "Adan")}
UNIT = BY_NAME[YARDSTICK].label
PEERS: dict[str, Builder] = {
    UNIT: BY_NAME[YARDSTICK].build,
    "torch AdamW, default": optimizer("torch.optim", "AdamW"),
}

# Whether tensor i of `count` has a gradient at step k.
Pattern = Callable[[int, int, int], bool]
PATTERNS: dict[str, Pattern] = {
    "the same every time": lambda i, k, count: True,
    "one tensor every other time": lambda i, k, count: i > 0 or k % 2 == 0,
    "another tenth each time": lambda i, k, count: (i + k) % 10 != 0,
    "half and half": lambda i, k, count: (2 * i < count) == (k % 2 == 0),
}


@dataclass(frozen=True)
class Row:
    """What was measured of an optimizer with one pattern."""

    pattern: str
    label: str
    ours: bool
    host_s: Summary  # a step; on a CPU that is all of it
    ratio: Summary  # to torch's fused AdamW's in the same round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    counts = {
        "tensors": (321, "tensors"),
        "elements": (64, "elements of a tensor"),
        "steps": (500, "timed steps of each optimizer with each pattern, at most"),
    }
    options.add_counts(parser, counts)
    parser.add_argument(
        "--seconds",
        type=options.positive_float,
        default=10.0,
        help=f"time for a pattern; {races.FEWEST_ROUNDS} steps are timed even if they last longer (default: 10)",
    )
    options.add_arguments(parser, threads=1)


def measure_pattern(pattern: str, args: argparse.Namespace) -> list[Row]:
    """Time every optimizer with one pattern."""
    has_gradient, dtype = PATTERNS[pattern], options.DTYPES[args.dtype]
    workload = Workload(((args.elements,),) * args.tensors, args.device, dtype)
    builders = {**OURS, **PEERS}
    lanes = [Lane(label, build(workload.parameters, eps_for(dtype))) for label, build in builders.items()]
    clock = clocks.host_clock_for(args.device)

    def come_and_go(step: int) -> None:
        for place, (parameter, gradient) in enumerate(zip(workload.parameters, workload.gradients, strict=True)):
            parameter.grad = gradient if has_gradient(place, step, args.tensors) else None

    races.race(lanes, clock, rounds=UNTIMED, seconds=inf, new_round=come_and_go)
    timings = races.race(lanes, clock, rounds=args.steps, seconds=args.seconds, new_round=come_and_go)
    hosts = {label: [timing.host for timing in rounds] for label, rounds in timings.items()}
    return [
        Row(pattern, label, label in OURS, summarize(hosts[label]), paired_ratios(hosts[label], hosts[UNIT]))
        for label in builders
    ]


def judge(rows: Sequence[Row]) -> list[Target]:
    """Return the targets, which are stated for 321 small float32 tensors."""
    return [
        Target(f"{row.label}, gradients: {row.pattern}, against torch's fused AdamW", MOST_OF_FUSED, row.ratio.median)
        for row in rows
        if row.ours
    ]


def table(rows: Sequence[Row], title: str) -> terminal.Table:
    """Return a row a measurement."""
    numbers = ("step()", "quartiles", "fastest", "steps", "of torch's fused")
    made = terminal.table(f"step() as gradients come and go: {title}", ["gradients", "optimizer"], numbers)
    for row in rows:
        host = row.host_s
        times = (units.duration(host.median), units.span(host), units.duration(host.smallest), str(host.count))
        style = "bold" if row.ours else None
        made.add_row(row.pattern, row.label, *times, units.times(row.ratio.median), style=style)
    return made


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 0."""
    options.heed(args)
    console = terminal.console()
    description = machine.describe(args.device)
    rows = [row for pattern in PATTERNS for row in measure_pattern(pattern, args)]
    title = f"{description['device_name']}, torch {torch.__version__}: {args.tensors} tensors of {args.elements}"
    console.print(table(rows, title))
    judged = judge(rows) if stated_for(args.tensors, args.elements, args.dtype) else []
    if judged:
        console.print(tables.targets_table(judged))
    settings = ("tensors", "elements", "steps", "seconds", "dtype", "tag")
    path = documents.write_run("gradients", args, {"format": 1, "machine": description}, settings, rows, judged)
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0
