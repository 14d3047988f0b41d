"""Races of whole steps: the contenders of a model set in batches that fit in memory, each warmed up, then timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.measuring import clocks, machine, races
from bench.measuring.clocks import CopyProbe, Timing
from bench.measuring.races import Lane
from bench.measuring.stats import summarize
from bench.reporting import results
from bench.reporting.results import Row, SetResult
from bench.workloads import contenders
from bench.workloads.building import eps_for, why_unmeasured
from bench.workloads.contenders import YARDSTICK, Contender
from bench.workloads.shapes import ModelSet
from bench.workloads.tensors import PrivateGradients, Workload

SHARE_OF_FREE_MEMORY = 0.75
COPY_MEBIBYTES = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class Settings:
    """How a set is measured."""

    device: torch.device
    dtype: torch.dtype
    rounds: int  # at most
    seconds: float  # for the rounds of a set, shared by its batches
    warmup: int = 2  # rounds that are not timed, before a batch's first timed one
    repeats: int = 2  # of a short step, before the one that is timed
    memory: float | None = None  # for a batch, in GiB; None: a share of what the device has free
    copy_mebibytes: int | None = None  # of each of the two tensors of the copy bandwidth; None: the device's usual size


class StepBench:
    """Measures one model set after the other with the same contenders, the yardstick among them."""

    def __init__(self, settings: Settings, entries: Sequence[Contender]) -> None:
        self.settings, self.contenders = settings, entries
        self.device = settings.device
        self.clock = clocks.clock_for(self.device)
        self.probe = CopyProbe(self.device, settings.copy_mebibytes or COPY_MEBIBYTES[self.device.type])
        self.samples: dict[str, list[dict[str, list[Timing]]]] = {}  # of each set the batches'

    def measure_set(self, model: ModelSet, log: Callable[[str], object]) -> SetResult:
        """Time every contender on one model set."""
        settings = self.settings
        budget = int(settings.memory * machine.GIB) if settings.memory else self.free_memory()
        model_bytes = model.elements * settings.dtype.itemsize
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
            timed.append(self.measure_batch(batch, workloads, settings.seconds / len(batches), unmeasured))
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
            figures = results.figures(contender, number, timings, model, settings.dtype, copy, count)
            rows.append(results.row(contender, "measured", figures=figures))
        counts = (len(model.shapes), model.elements)
        finite = all(workload.finite() for workload in workloads.values())
        return SetResult(model.name, model.title, *counts, copy, rows, finite, other_work.share())

    def parameter_type(self, contender: Contender) -> torch.dtype:
        """Return the type of the parameters that a contender is given."""
        return contender.stored(self.settings.dtype).parameter

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
                for number in range(self.settings.warmup):
                    turn(number)
                    lane.visit(self.clock)
            except Exception as error:  # one contender's failure must not cost the others' figures
                if contender.name == YARDSTICK:
                    raise
                unmeasured[contender.name] = results.row(contender, *why_unmeasured(error))
            else:
                lanes.append(lane)
        timings = races.race(
            lanes,
            self.clock,
            rounds=self.settings.rounds,
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
        step = contender.build(workload.parameters, eps_for(self.parameter_type(contender)))
        repeats = self.settings.repeats
        if not contender.writes_gradients:
            return Lane(contender.name, step, repeats=repeats)
        private = PrivateGradients(workload)
        return Lane(contender.name, step, before=private.lend, after=private.take_back, repeats=repeats)

    def free_memory(self) -> int:
        """Return the share of the free memory that a batch may take, in bytes."""
        self.release_memory()
        return int(SHARE_OF_FREE_MEMORY * machine.free_memory(self.device))

    def release_memory(self) -> None:
        """Give back what the last batch's optimizers held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
