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
not there, its rows are left out and say why.

Writes step-DEVICE-DTYPE-TAG.json (medians, quartiles and ratios) and .png into the output folder, anew after each model
set; with --samples also step-DEVICE-DTYPE-TAG.samples.json, every round's times. Where rows have formats of their own,
"precision" stands for the DTYPE. Exit code 0, or 1 if an installed contender failed or made a parameter infinite, or 2
for bad arguments.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence

import torch

from bench.commands import options
from bench.measuring import clocks, machine, races
from bench.measuring.clocks import CopyProbe, Timing
from bench.measuring.races import Lane
from bench.measuring.stats import summarize
from bench.reporting import chart, pictures, results, tables, targets, terminal
from bench.reporting.results import Row, SetResult
from bench.workloads import contenders, shapes
from bench.workloads.contenders import YARDSTICK, Contender
from bench.workloads.shapes import ModelSet
from bench.workloads.tensors import PrivateGradients, Workload

SHARE_OF_FREE_MEMORY = 0.75
COPY_MEBIBYTES = {"cpu": 256, "cuda": 1024}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    options.add_sets(parser, shapes.DEFAULT_SETS)
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        type=options.named(contenders.contender),
        default=list(contenders.ALL),
        help=f"rows, of {', '.join(contenders.BY_NAME)}; {YARDSTICK} is always added, and those that are for a GPU "
        "alone or for a CPU alone are left out elsewhere (default: all that store their numbers as --dtype says)",
    )
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


class Bench:
    """The settings of one run, and the steps that measure a model set."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: torch.device = args.device
        self.dtype = options.DTYPES[args.dtype]
        self.clock = clocks.clock_for(self.device)
        self.probe = CopyProbe(self.device, args.copy_mebibytes or COPY_MEBIBYTES[self.device.type])
        self.samples: dict[str, list[dict[str, list[Timing]]]] = {}  # of each set the batches'
        chosen = {entry.name for entry in args.contenders} | {YARDSTICK}
        self.contenders = [
            entry
            for entry in (*contenders.ALL, *contenders.PRECISION)
            if entry.name in chosen and self.device.type in entry.devices
        ]

    def measure_set(self, model: ModelSet, log: Callable[[str], object]) -> SetResult:
        """Time every contender on one model set."""
        budget = int(self.args.memory * machine.GIB) if self.args.memory else self.free_memory()
        model_bytes = model.elements * self.dtype.itemsize
        batches = contenders.batches(self.contenders, model_bytes, budget)
        log(f"Measuring {model.title} ...")
        dtypes = dict.fromkeys(map(self.parameter_type, self.contenders))
        workloads = {dtype: Workload(model.shapes, self.device, dtype) for dtype in dtypes}
        self.probe.clear()
        self.probe()
        unmeasured: dict[str, Row] = {}
        timed: list[tuple[dict[str, list[Timing]], dict[str, int]]] = []
        other_work = machine.OtherWork()
        for place, batch in enumerate(batches, 1):
            names = ", ".join(contender.name for contender in batch)
            log(f"  batch {place} of {len(batches)}: {names}")
            timed.append(self.measure_batch(batch, workloads, self.args.seconds / len(batches), unmeasured))
            self.release_memory()
        self.samples[model.name] = [timings for timings, _ in timed]
        copy = summarize(self.probe.samples)
        rows: list[Row] = []
        for contender in self.contenders:
            if contender.name in unmeasured:
                rows.append(unmeasured[contender.name])
                continue
            # The yardstick runs in every batch: its row shows the first, each batch's ratios use its own.
            number = next(i for i, (timings, _) in enumerate(timed) if contender.name in timings)
            timings, kernels = timed[number]
            count = kernels.get(contender.name)
            figures = results.figures(contender, number, timings, model, self.dtype, copy, count)
            rows.append(results.row(contender, "measured", figures=figures))
        counts = (len(model.shapes), model.elements)
        finite = all(workload.finite() for workload in workloads.values())
        return SetResult(model.name, model.title, *counts, copy, rows, finite, other_work.share())

    def parameter_type(self, contender: Contender) -> torch.dtype:
        """Return the type of the parameters that a contender is given."""
        return contender.format.parameter if contender.format else self.dtype

    def measure_batch(
        self,
        batch: Sequence[Contender],
        workloads: Mapping[torch.dtype, Workload],
        seconds: float,
        unmeasured: dict[str, Row],
    ) -> tuple[dict[str, list[Timing]], dict[str, int]]:
        """Warm up and race one batch; contenders that cannot run go to `unmeasured`.

        Returns each contender's timings, and on a GPU the number of kernels of agr_cuda's contenders.
        """
        lanes: list[Lane] = []

        def turn(number: int) -> None:
            for workload in workloads.values():
                workload.turn(number)

        for contender in batch:
            try:
                lane = self.lane(contender, workloads[self.parameter_type(contender)])
                for number in range(self.args.warmup):
                    turn(number)
                    lane.visit(self.clock)
            except contenders.LeftOutError as error:
                unmeasured[contender.name] = results.row(contender, error.status, str(error))
            except Exception as error:  # one contender's failure must not cost the others' figures
                if contender.name == YARDSTICK:
                    raise
                reason = f"{type(error).__name__}: {error}"
                unmeasured[contender.name] = results.row(contender, "failed", reason)
            else:
                lanes.append(lane)
        timings = races.race(
            lanes,
            self.clock,
            rounds=self.args.rounds,
            seconds=seconds,
            new_round=turn,
            between=self.probe,
        )
        kernels: dict[str, int] = {}
        if self.device.type == "cuda":
            ours = {entry.name for entry in batch if entry.ours}
            kernels = {lane.name: clocks.count_kernels(lane.step) for lane in lanes if lane.name in ours}
        return timings, kernels

    def lane(self, contender: Contender, workload: Workload) -> Lane:
        """Return a contender with its optimizer, and with its own gradients if it writes them."""
        step = contenders.build(contender, workload.parameters, contenders.eps_for(self.parameter_type(contender)))
        if not contender.writes_gradients:
            return Lane(contender.name, step, repeats=self.args.repeats)
        private = PrivateGradients(workload)
        return Lane(contender.name, step, before=private.lend, after=private.take_back, repeats=self.args.repeats)

    def free_memory(self) -> int:
        """Return the share of the free memory that a batch may take, in bytes."""
        self.release_memory()
        return int(SHARE_OF_FREE_MEMORY * machine.free_memory(self.device))

    def release_memory(self) -> None:
        """Give back what the last batch's optimizers held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 1 if an installed contender failed, else 0."""
    options.heed(args)
    console = terminal.console()
    bench = Bench(args)
    description = machine.describe(args.device)
    settings = {
        "dtype": args.dtype,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "warmup": args.warmup,
        "repeats": args.repeats,
        "tag": args.tag,
        "learning_rate": contenders.LEARNING_RATE,
        "weight_decay": contenders.WEIGHT_DECAY,
    }
    stored = "precision" if any(contender.format for contender in bench.contenders) else args.dtype
    stem = f"step-{args.device.type}-{stored}-{args.tag}"
    measured_on = results.measured_on({"machine": description, "settings": settings})
    console.print(f"{measured_on}, {description['date']}", highlight=False)

    backends = machine.our_backends()
    if args.device.type == "cpu" and "cpu" not in backends:
        console.print(f"[red]agr_cuda's backends here are {backends}: its rows measure plain operations.")

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
        pictures.save(args.out / f"{stem}.png", chart.figure, args.out / f"{stem}.json")
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
    console.print(f"Wrote {args.out / stem}.json and .png", highlight=False, soft_wrap=True)
    failed = any(row.status == "failed" for result in found for row in result.rows)
    return int(failed or not all(result.parameters_finite for result in found))
