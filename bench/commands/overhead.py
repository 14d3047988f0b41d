"""Time what step() costs the host: many small tensors, agr_cuda's optimizers beside torch's fused and foreach AdamW.

On a GPU, steps are launched for real, each on an idle device, and timed until step() returns; agr_cuda's backends cuda
and triton are measured, or the one that is there. Without a GPU, the cuda backend's launches are rehearsed (it does
everything but the launch itself, on tensors on the CPU), torch's fused AdamW runs without its fused operation, so that
what is left of it is less than what it costs on a GPU, and foreach runs its operations on the CPU. A second ratio is
then to torch's fused AdamW with its operation, on the CPU: all that a step of it costs there.

Every optimizer is measured twice: with the same gradients all the time, and with new ones for every step, made by
backward() outside the clock, as zero_grad() and backward() make them in training. Optimizers take turns in blocks of
steps; a block's first steps are not timed, so that the caches hold what they hold in a loop.

The targets are the cuda backend's. Writes overhead-DEVICE-TAG.json into the output folder. Exit code 0, or 2 where
agr_cuda has no backend to measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any

import torch

from bench.commands import options
from bench.measuring import clocks, machine, races
from bench.measuring.stats import Summary, paired_ratios, summarize
from bench.reporting import documents, tables, terminal, units
from bench.reporting.targets import HOST_OF_FUSED, Target, stated_for
from bench.workloads import contenders
from bench.workloads.building import Parameters, Step, eps_for
from bench.workloads.contenders import BY_NAME, YARDSTICK

UNTIMED = 5  # steps at the beginning of a block
BACKENDS = {"cuda": "", "triton": ", Triton"}  # those that launch on a GPU, and what labels say of them
Around = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Entry:
    """An optimizer that is measured."""

    label: str
    build: Callable[[Parameters], Step]
    backend: str = ""  # of agr_cuda's optimizers
    yardstick: bool = False
    whole: bool = False  # torch's fused AdamW with its operation, where the yardstick is without
    around: Around = nullcontext  # a block of its steps


@dataclass(frozen=True)
class Row:
    """What was measured of an optimizer with one kind of gradients."""

    label: str
    gradients: str  # "kept" or "new"
    backend: str  # of agr_cuda's optimizers; of others nothing
    host_s: Summary  # a step
    ratio: Summary  # of blocks' medians, to the yardstick's with the same kind of gradients
    ratio_to_whole: Summary | None  # to torch's fused AdamW's with its operation; None where that is the yardstick


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    counts = {
        "tensors": (321, "tensors"),
        "elements": (64, "elements of a tensor"),
        "steps": (2000, "timed steps of each optimizer with each kind of gradients"),
        "block": (50, "timed steps in a row"),
    }
    options.add_counts(parser, counts)
    # More would wait by spinning for work that there is none of, and take the host's core where there are few.
    options.add_arguments(parser, threads=1)


def ours(rule: str, backend: str) -> Entry:
    """Return agr_cuda's optimizer of that rule on a backend that launches on a GPU."""

    def build(parameters: Parameters) -> Step:
        return contenders.of_backend(backend, rule)(parameters, eps_for(parameters[0].dtype))

    return Entry(f"agr_cuda {rule}{BACKENDS[backend]}", build, backend)


def torchs(name: str, note: str = "", **more: Any) -> Entry:
    """Return one of the step benchmark's contenders."""
    contender = BY_NAME[name]

    def build(parameters: Parameters) -> Step:
        return contender.build(parameters, eps_for(parameters[0].dtype))

    return Entry(contender.label + note, build, **more)


@contextmanager
def without_fused_operation() -> Iterator[None]:
    """Replace the operation that does torch's fused AdamW's work by nothing."""
    operation: Any = torch._fused_adamw_
    namespace: Any = torch
    namespace._fused_adamw_ = lambda *tensors, **numbers: None
    try:
        yield
    finally:
        namespace._fused_adamw_ = operation


def launching(like: torch.Tensor, log: Callable[[str], object]) -> list[str]:
    """Return agr_cuda's backends that take such parameters, and say why others do not."""
    reasons = {backend: contenders.why_not(backend, like) for backend in BACKENDS}
    for backend, reason in reasons.items():
        if reason is not None:
            log(f"No {backend} backend: {reason}")
    return [backend for backend, reason in reasons.items() if reason is None]


def entries(on_gpu: bool, backends: Sequence[str]) -> list[Entry]:
    """Return the optimizers, agr_cuda's on these backends, the yardstick among them."""
    if on_gpu:
        peers = [torchs(YARDSTICK, yardstick=True)]
    else:
        peers = [
            torchs(YARDSTICK, ", its operation left out", yardstick=True, around=without_fused_operation),
            torchs(YARDSTICK, ", on the CPU", whole=True),
        ]
    own = [ours(rule, backend) for backend in backends for rule in ("AdamW", "Adan")]
    return [*own, *peers, torchs("torch-adamw-foreach", "" if on_gpu else ", on the CPU")]


class Track:
    """An optimizer with parameters and gradients of its own."""

    def __init__(self, entry: Entry, new_gradients: bool, args: argparse.Namespace) -> None:
        self.entry, self.new_gradients = entry, new_gradients
        like: dict[str, Any] = {"device": args.device, "dtype": options.DTYPES[args.dtype]}
        self.parameters = [torch.nn.Parameter(torch.randn(args.elements, **like)) for _ in range(args.tensors)]
        self.source = torch.randn(args.tensors * args.elements, **like)
        self.clock = clocks.host_clock_for(args.device)
        self.blocks: list[list[float]] = []
        self.backward()
        self.step = entry.build(self.parameters)

    def backward(self) -> None:
        """Make new gradients as zero_grad() and a backward pass do: tensors that Python has not seen yet."""
        for parameter in self.parameters:
            parameter.grad = None
        torch.autograd.backward(torch.cat([*self.parameters]), self.source)

    def run(self, steps: int) -> None:
        """Take a block of steps."""
        times = []
        with self.entry.around():
            for _ in range(UNTIMED + steps):
                if self.new_gradients:
                    self.backward()
                times.append(self.clock(self.step).host)
        self.blocks.append(times[UNTIMED:])

    def ratio_to(self, other: Track) -> Summary:
        """Return the ratios of the blocks' medians to the other's."""
        return paired_ratios([median(block) for block in self.blocks], [median(block) for block in other.blocks])


def measure_all(args: argparse.Namespace, backends: Sequence[str]) -> list[Row]:
    """Measure every optimizer, agr_cuda's on these backends, with both kinds of gradients."""
    on_gpu = args.device.type == "cuda"
    tracks = [Track(entry, new, args) for entry in entries(on_gpu, backends) for new in (False, True)]
    with races.collector_off():
        for _ in range(max(1, round(args.steps / args.block))):
            for track in tracks:
                track.run(args.block)
    rows = []
    for track in tracks:
        alike = [other for other in tracks if other.new_gradients == track.new_gradients]
        ratio = track.ratio_to(next(other for other in alike if other.entry.yardstick))
        whole = next((other for other in alike if other.entry.whole), None)
        ratio_to_whole = track.ratio_to(whole) if whole and track.entry.backend else None
        host_s = summarize([seconds for block in track.blocks for seconds in block])
        gradients = "new" if track.new_gradients else "kept"
        rows.append(Row(track.entry.label, gradients, track.entry.backend, host_s, ratio, ratio_to_whole))
    return rows


def judge(rows: list[Row], on_gpu: bool) -> list[Target]:
    """Return the design's targets for the host's time. They are stated for 321 small float32 tensors and cuda alone."""
    peer = "torch's fused AdamW" if on_gpu else "torch's fused AdamW without its operation, rehearsed"
    return [
        Target(
            f"{row.label}, {row.gradients} gradients: host time of step() against {peer}",
            HOST_OF_FUSED[row.gradients],
            row.ratio.median,
        )
        for row in rows
        if row.backend == "cuda"
    ]


def table(rows: list[Row], title: str) -> terminal.Table:
    """Return a row a measurement."""
    on_gpu = all(row.ratio_to_whole is None for row in rows)
    ratios = ("of torch's fused",) if on_gpu else ("of torch's fused", "with its operation")
    numbers = ("step()", "quartiles", "fastest", "steps", *ratios)
    made = terminal.table(f"Host time of step(): {title}", ["optimizer", "gradients"], numbers)
    for row in rows:
        figures = (row.host_s.median, row.host_s.smallest)
        shown, fastest = map(units.duration, figures)
        cells = [shown, units.span(row.host_s), fastest, str(row.host_s.count), units.times(row.ratio.median)]
        if row.ratio_to_whole:
            cells.append(units.times(row.ratio_to_whole.median))
        made.add_row(row.label, row.gradients, *cells, style="bold" if row.backend else None)
    return made


def rehearsal() -> AbstractContextManager[object] | None:
    """Return what makes the cuda backend take tensors on the CPU and leave out launches; None if it is not there."""
    try:
        made: AbstractContextManager[object] = import_module("agr_cuda.cuda").rehearsal()
    except (ImportError, AttributeError):
        return None
    return made


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 2 where agr_cuda has no backend to measure, else 0."""
    options.heed(args)
    console = terminal.console()
    on_gpu = args.device.type == "cuda"
    around = nullcontext() if on_gpu else rehearsal()
    if around is None:
        console.print("agr_cuda.cuda.rehearsal is missing: this version of agr_cuda has no cuda backend to measure.")
        return 2
    backends = ["cuda"]
    if on_gpu:
        like = torch.empty(0, device=args.device, dtype=options.DTYPES[args.dtype])
        backends = launching(like, lambda text: console.print(text, highlight=False, markup=False))
        if not backends:
            return 2
    description = machine.describe(args.device)
    with around:
        rows = measure_all(args, backends)
    title = f"{description['device_name']}, torch {torch.__version__}: {args.tensors} tensors of {args.elements}"
    console.print(table(rows, title))
    judged = judge(rows, on_gpu) if stated_for(args.tensors, args.elements, args.dtype) else []
    if judged:
        console.print(tables.targets_table(judged))
    about = {"format": 3, "machine": description, "rehearsed": not on_gpu}
    settings = ("tensors", "elements", "steps", "block", "dtype", "tag")
    path = documents.write_run("overhead", args, about, settings, rows, judged)
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0
