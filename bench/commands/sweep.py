"""Sweep size and number of tensors: the bandwidth that each optimizer's step reaches, beside that of a copy.

Every point is a set of equal tensors, measured as `step` measures a set: all contenders interleaved, medians of rounds.
A small step costs what its calls and launches do, whatever its bytes; a large one is limited by memory; between them
tensors may fit in a cache, where a step can be faster than the copy of large tensors that is drawn as a line. What is
counted are the bytes that the rule must move (float32: AdamW 28, Adan 44 an element).

Writes sweep-DEVICE-TAG.json into the output folder, anew after each point, and at last .png. Exit code 0, or 1 if an
installed contender failed or made a parameter infinite, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from bench.commands import options
from bench.measuring import machine
from bench.measuring.steps import Settings, StepBench
from bench.reporting import drawing, results, tables, terminal, units
from bench.reporting.results import SetResult
from bench.workloads import building, contenders
from bench.workloads.contenders import YARDSTICK
from bench.workloads.shapes import ModelSet, model_set

COUNTS = (1, 16, 256)
ELEMENTS = tuple(4**power for power in range(5, 13))  # 1,024 to 16,777,216
CONTENDERS = (
    *("agr-adamw", "agr-adamw-triton", YARDSTICK, "torch-adamw-foreach", "three-lines", "deepspeed-adamw"),
    *("agr-adan", "agr-adan-triton", "optimi-adan-foreach", "optimi-adan-triton"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.set_defaults(refuse=parser.error)
    sizes = {"counts": (COUNTS, "numbers of tensors"), "elements": (ELEMENTS, "elements of all tensors together")}
    for name, (default, what) in sizes.items():
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=options.positive_int,
            default=default,
            metavar="COUNT",
            help=f"{what}; every one is combined with every other, if that is an element for each tensor at least "
            f"(default: {' '.join(map(str, default))})",
        )
    options.add_contenders(parser, f"{', '.join(CONTENDERS)}; {YARDSTICK} is always added")
    options.add_counts(parser, {"rounds": (300, "timed rounds of a point, at most")})
    parser.add_argument(
        "--seconds",
        type=options.positive_float,
        default=100.0,
        metavar="SECONDS",
        help="time for all rounds together, an equal part for each point; setting up comes on top (default: 100)",
    )
    options.add_arguments(parser)


def points(counts: Sequence[int], elements: Sequence[int]) -> Iterator[ModelSet]:
    """Yield a set of equal tensors for every count and size, so far as an element is left for each tensor."""
    for count in sorted(set(counts)):
        for size in sorted({size // count for size in elements}):
            if size:
                yield model_set(f"{count}x{size}")


def table(found: Sequence[SetResult], title: str) -> terminal.Table:
    """Return contenders down, sizes across: a step's time, and the gigabytes a second that it makes."""
    made = terminal.table(title, ["elements of all tensors"], [f"{result.elements:,}" for result in found])
    for place, row in enumerate(found[0].rows):
        cells = []
        for result in found:
            figures = result.rows[place].figures
            rate = f"{units.duration(figures.step_s.median)}, {figures.bytes_per_second / 1e9:.2g}" if figures else "-"
            cells.append(rate)
        made.add_row(row.label, *cells, style="bold" if row.ours else None)
    made.add_row("copy of large tensors", *(f"{result.copy.median / 1e9:.2g}" for result in found), style="dim")
    return made


LEGEND = "Beside each median time of a step: gigabytes a second, of the bytes that the rule must move."


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 1 if an installed contender failed, else 0."""
    options.heed(args)
    console = terminal.console()
    models = list(points(args.counts, args.elements))
    if not models:
        largest, fewest = max(args.elements), min(args.counts)
        args.refuse(
            f"argument --elements: {largest} is less than an element a tensor: --counts asks for at least {fewest}"
        )
    choice = contenders.choose(args.device.type, args.contenders, CONTENDERS, always=[YARDSTICK])
    for line in tables.left_out(choice):
        console.print(line, highlight=False, markup=False)
    settings = Settings(args.device, options.DTYPES[args.dtype], args.rounds, args.seconds / len(models))
    bench = StepBench(settings, choice.entries)
    description = machine.describe(args.device)
    about = f"{description['device_name']}, {args.dtype}, torch {torch.__version__}"
    written = {name: getattr(args, name) for name in ("dtype", "counts", "elements", "rounds", "seconds", "tag")}
    written |= {"learning_rate": building.LEARNING_RATE, "left_out": choice.left_out}
    path = args.out / f"sweep-{args.device.type}-{args.tag}.json"
    found: list[SetResult] = []
    reasons: dict[str, None] = {}  # in the order in which they appear
    for model in models:
        found.append(bench.measure_set(model, lambda text: None))
        reasons |= dict.fromkeys(tables.reasons(found[-1]))
        results.write(path, description, written, found, [])
    wrote = drawing.draw(path, "sweep_chart")
    for count in dict.fromkeys(result.tensors for result in found):
        of_count = [result for result in found if result.tensors == count]
        console.print(table(of_count, f"A step of {count:,} equal tensors: {about}"))
    for reason in reasons:
        console.print(reason, highlight=False, markup=False)
    console.print(LEGEND, highlight=False)
    console.print(f"Wrote {wrote}", highlight=False, soft_wrap=True)
    failed = any(row.status == "failed" for result in found for row in result.rows)
    return int(failed or not all(result.parameters_finite for result in found))
