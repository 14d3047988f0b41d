"""What a run of `step` found, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from bench.measuring.clocks import Timing
from bench.measuring.stats import Summary, paired_ratios, ratio_of_fastest, ratio_of_medians, summarize
from bench.workloads.contenders import YARDSTICK, Contender, Unmeasured
from bench.workloads.shapes import ModelSet

DISTURBING = 0.1  # share of the processors
Status = Literal["measured", "failed"] | Unmeasured


@dataclass(frozen=True)
class Figures:
    """What was measured of one contender. Times are seconds a step, ratios are to the yardstick's time."""

    batch: int  # contenders of one batch were alive and interleaved together
    step_s: Summary
    host_s: Summary  # until step() returned; the same as step_s on a CPU
    ratio: Summary  # of rounds' pairs: the headline
    ratio_of_medians: float
    ratio_of_fastest: float
    host_ratio: Summary
    bytes_per_element: int  # that its rule must move
    bytes_per_second: float  # those bytes over the median time
    share_of_copy: float  # of the copy bandwidth measured between the same rounds
    kernels: int | None  # launched by one step; counted for agr_cuda's on a GPU
    samples: list[Timing] = field(repr=False)  # one a round


@dataclass(frozen=True)
class Row:
    """One contender on one model set."""

    name: str
    label: str
    rule: str
    agr: bool
    ours: bool
    status: Status
    reason: str  # why it was not measured
    figures: Figures | None


@dataclass
class SetResult:
    """All contenders on one model set."""

    name: str
    title: str
    tensors: int
    elements: int
    copy: Summary  # bytes a second of a large float32 copy_, both directions counted
    rows: list[Row]
    parameters_finite: bool
    other_work: float | None  # share of the processors that other processes took meanwhile

    @property
    def disturbed(self) -> bool:
        """Whether other work took so much that times on the CPU say little."""
        return self.other_work is not None and self.other_work > DISTURBING

    def figures(self, name: str) -> Figures | None:
        """Return a contender's figures, or None if it was not measured."""
        return next((row.figures for row in self.rows if row.name == name), None)


def row(contender: Contender, status: Status, reason: str = "", figures: Figures | None = None) -> Row:
    """Return the row of a contender."""
    named = (contender.name, contender.label, contender.rule, contender.agr, contender.ours)
    return Row(*named, status, reason, figures)


def figures(
    contender: Contender,
    batch: int,
    timings: Sequence[Timing],
    yardstick: Sequence[Timing],
    model: ModelSet,
    itemsize: int,
    copy: Summary,
    kernels: int | None = None,
) -> Figures:
    """Return the figures of a contender timed in a batch with the yardstick, round by round."""
    steps, hosts = [timing.step for timing in timings], [timing.host for timing in timings]
    unit_steps, unit_hosts = [timing.step for timing in yardstick], [timing.host for timing in yardstick]
    step_s = summarize(steps)
    bytes_per_element = contender.accesses * itemsize
    bytes_per_second = bytes_per_element * model.elements / step_s.median
    return Figures(
        batch=batch,
        step_s=step_s,
        host_s=summarize(hosts),
        ratio=paired_ratios(steps, unit_steps),
        ratio_of_medians=ratio_of_medians(steps, unit_steps),
        ratio_of_fastest=ratio_of_fastest(steps, unit_steps),
        host_ratio=paired_ratios(hosts, unit_hosts),
        bytes_per_element=bytes_per_element,
        bytes_per_second=bytes_per_second,
        share_of_copy=bytes_per_second / copy.median,
        kernels=kernels,
        samples=list(timings),
    )


@dataclass(frozen=True)
class Comparison:
    """Two contenders' times: the headline ratio, and that of each one's fastest step."""

    ratio: float
    ratio_of_fastest: float


def compare(result: SetResult, name: str, peer: str) -> Comparison | None:
    """Return the first contender's time over the peer's; None where one was not measured.

    From the rounds where both ran in one batch, else the quotient of their ratios to the yardstick. (The
    yardstick runs in every batch, so that a ratio to it is always of pairs.)
    """
    own, other = result.figures(name), result.figures(peer)
    if own is None or other is None:
        return None
    if peer == YARDSTICK or own.batch != other.batch:
        ratio = own.ratio.median / other.ratio.median
        return Comparison(ratio, own.ratio_of_fastest / other.ratio_of_fastest)
    steps, peer_steps = [timing.step for timing in own.samples], [timing.step for timing in other.samples]
    return Comparison(paired_ratios(steps, peer_steps).median, ratio_of_fastest(steps, peer_steps))


def write_json(
    path: Path,
    machine: dict[str, object],
    settings: dict[str, object],
    results: list[SetResult],
    targets: list[dict[str, object]],
) -> None:
    """Write a run as JSON. Times are seconds, rates bytes a second, samples [step, host] of each round."""
    document = {
        "format": 1,
        "yardstick": YARDSTICK,
        "headline": "ratio: median of the rounds' own ratios, as drift of a shared machine cancels in a pair",
        "machine": machine,
        "settings": settings,
        "sets": [asdict(result) for result in results],
        "targets": targets,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
