"""Time whole optimizer steps: agr_cuda's AdamW and Adan beside their peers, interleaved.

All contenders of a model set are alive together and share its parameters and gradients; each has its own
state (and its own gradients if its step writes them: these are restored outside the clock after every step).
Each round visits every contender in a shuffled order and times one step of it; of a short one the third in a
row, as in training, where the backward pass has just gone over what the step begins with. Where the memory
budget cannot hold all contenders, they run in batches, each with torch's fused AdamW as the common yardstick.
Rounds alternate between two sets of gradients, as training brings new ones at new addresses. Warm-up rounds
come first, and Python's garbage collector is off.

With --precision, rows store their numbers in formats of their own (docs/precision.md), and share parameters with those
of the same type. The column "a byte" says whether a step takes longer than the bytes do that its format must move.

On a GPU, agr_cuda's rows are of its cuda backend, but for those of its triton backend. Where a backend or a package is
not there, or cannot run, its rows say why; what is for the other kind of device alone is named before the first set.

Writes step-DEVICE-DTYPE-TAG.json (medians, quartiles and ratios) and .png into the output folder, anew after each model
set; with --samples also step-DEVICE-DTYPE-TAG.samples.json, every round's times. Where rows have formats of their own,
"precision" stands for the DTYPE. Exit code 0, or 1 if an installed contender failed or made a parameter infinite, or 2
for bad arguments.
"""

from __future__ import annotations

import argparse

from bench.commands import options
from bench.measuring import machine, races
from bench.measuring.steps import COPY_MEBIBYTES, SHARE_OF_FREE_MEMORY, Settings, StepBench
from bench.reporting import drawing, results, tables, targets, terminal
from bench.reporting.results import SetResult
from bench.workloads import building, contenders, shapes
from bench.workloads.contenders import YARDSTICK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    options.add_sets(parser, shapes.DEFAULT_SETS)
    options.add_contenders(parser, f"all that store their numbers as --dtype says; {YARDSTICK} is always added")
    parser.add_argument(
        "--precision",
        dest="contenders",
        action="store_const",
        const=[contenders.contender("agr-adamw"), *contenders.PRECISION],
        help="rows that store their numbers in formats of their own, beside AGR-AdamW and the fused AdamW in --dtype",
    )
    parser.add_argument(
        "--rounds",
        type=options.positive_int,
        default=1000,
        metavar="COUNT",
        help="most timed rounds of a set, each one step of every contender (default: 1000)",
    )
    parser.add_argument(
        "--seconds",
        type=options.positive_float,
        default=40.0,
        metavar="SECONDS",
        help="time for the rounds of a set, shared by its batches; at least "
        f"{races.FEWEST_ROUNDS} rounds of each batch are taken even if they last longer (default: 40)",
    )
    parser.add_argument(
        "--warmup",
        type=options.positive_int,
        default=2,
        metavar="COUNT",
        help="rounds that are not timed, before the first timed one of a batch (default: 2)",
    )
    parser.add_argument(
        "--repeats",
        type=options.natural_int,
        default=2,
        metavar="COUNT",
        help=f"a step of under {1000 * races.SHORT_STEP:.0f} ms is taken this many times more and the last is timed; "
        "with 0, the other contenders have driven its tensors out of the caches (default: 2)",
    )
    parser.add_argument(
        "--memory",
        type=options.positive_float,
        metavar="GIB",
        help="memory for a batch of contenders, in GiB "
        f"(default: {100 * SHARE_OF_FREE_MEMORY:.0f}%% of what the device has free)",
    )
    parser.add_argument(
        "--copy-mebibytes",
        type=options.positive_int,
        metavar="MIB",
        help="size of each of the two tensors of the copy bandwidth, in MiB; should be well above the last "
        f"cache's (default: {COPY_MEBIBYTES['cpu']} on a CPU, {COPY_MEBIBYTES['cuda']} on a GPU)",
    )
    parser.add_argument("--samples", action="store_true", help="also write every round's times, in a second JSON file")
    options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 1 if an installed contender failed, else 0."""
    options.heed(args)
    console = terminal.console()
    default = [entry.name for entry in contenders.ALL]
    choice = contenders.choose(args.device.type, args.contenders, default, always=[YARDSTICK])
    given = (args.rounds, args.seconds, args.warmup, args.repeats, args.memory, args.copy_mebibytes)
    bench = StepBench(Settings(args.device, options.DTYPES[args.dtype], *given), choice.entries)
    description = machine.describe(args.device)
    settings = {
        "dtype": args.dtype,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "warmup": args.warmup,
        "repeats": args.repeats,
        "tag": args.tag,
        "learning_rate": building.LEARNING_RATE,
        "weight_decay": building.WEIGHT_DECAY,
        "left_out": choice.left_out,
    }
    stored = "precision" if any(contender.format for contender in choice.entries) else args.dtype
    stem = f"step-{args.device.type}-{stored}-{args.tag}"
    measured_on = results.measured_on({"machine": description, "settings": settings})
    console.print(f"{measured_on}, {description['date']}", highlight=False)

    backends = machine.our_backends()
    if args.device.type == "cpu" and "cpu" not in backends:
        console.print(f"[red]agr_cuda's backends here are {backends}: its rows measure plain operations.")
    for line in tables.left_out(choice):
        console.print(line, highlight=False, markup=False)

    on_gpu = args.device.type == "cuda"
    found: list[SetResult] = []
    judged: list[targets.Target] = []
    for model in args.sets:
        found.append(bench.measure_set(model, lambda text: console.print(text, highlight=False)))
        judged = targets.judge(found, args.device.type) if args.dtype == "float32" else []
        records = [target.record() for target in judged]
        results.write(args.out / f"{stem}.json", description, settings, found, records)
        if args.samples:
            results.write_samples(args.out / f"{stem}.samples.json", bench.samples)
        wrote = drawing.draw(args.out / f"{stem}.json", "step_chart")
        console.print(tables.results_table(found[-1], on_gpu))
        for reason in tables.reasons(found[-1]):
            console.print(reason, highlight=False, markup=False)
        if not found[-1].parameters_finite:
            console.print("[red]Parameters are no longer finite: a contender's step is wrong.")

    console.print(tables.legend(on_gpu), highlight=False)
    if judged:
        console.print(tables.targets_table(judged))
    else:
        console.print("The targets are stated for float32, so this run does not judge them.")
    console.print(f"Wrote {wrote}", highlight=False, soft_wrap=True)
    failed = any(row.status == "failed" for result in found for row in result.rows)
    return int(failed or not all(result.parameters_finite for result in found))
