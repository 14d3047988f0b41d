"""What a run of `step` found, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.measuring.clocks import Timing
from bench.measuring.stats import Summary, paired_ratios, ratio_of_fastest, ratio_of_medians, summarize
from bench.reporting import documents
from bench.workloads.building import Unmeasured
from bench.workloads.contenders import BY_NAME, YARDSTICK, Contender
from bench.workloads.shapes import ModelSet

DISTURBING = 0.1  # share of the processors
Status = Literal["measured"] | Unmeasured


@dataclass(frozen=True)
class Comparison:
    """Two contenders' times: median of the rounds' ratios, and the ratio of each one's fastest step."""

    ratio: float
    ratio_of_fastest: float


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
    bytes_per_element: float  # that its rule must move
    ratio_per_byte: float  # the ratio, of the time for each of those bytes
    bytes_per_second: float  # those bytes over the median time
    share_of_copy: float  # of the copy bandwidth measured between the same rounds
    kernels: int | None  # launched by one step; counted for agr_cuda's on a GPU
    against: dict[str, Comparison]  # its rivals in the same batch


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
    timings: Mapping[str, Sequence[Timing]],
    model: ModelSet,
    dtype: torch.dtype,
    copy: Summary,
    kernels: int | None = None,
) -> Figures:
    """Return the figures of a contender from the timings of its batch: by name, round by round, the yardstick's too.

    What a contender stores is of type `dtype`, unless it has a format of its own.
    """
    steps, hosts = ({name: [timing[part] for timing in rounds] for name, rounds in timings.items()} for part in (0, 1))
    own, unit = steps[contender.name], steps[YARDSTICK]
    step_s = summarize(own)
    ratio = paired_ratios(own, unit)
    bytes_per_element = contender.bytes_per_element(dtype)
    bytes_per_second = bytes_per_element * model.elements / step_s.median
    return Figures(
        batch=batch,
        step_s=step_s,
        host_s=summarize(hosts[contender.name]),
        ratio=ratio,
        ratio_of_medians=ratio_of_medians(own, unit),
        ratio_of_fastest=ratio_of_fastest(own, unit),
        host_ratio=paired_ratios(hosts[contender.name], hosts[YARDSTICK]),
        bytes_per_element=bytes_per_element,
        ratio_per_byte=ratio.median * BY_NAME[YARDSTICK].bytes_per_element(dtype) / bytes_per_element,
        bytes_per_second=bytes_per_second,
        share_of_copy=bytes_per_second / copy.median,
        kernels=kernels,
        against={
            rival: Comparison(paired_ratios(own, steps[rival]).median, ratio_of_fastest(own, steps[rival]))
            for rival in contender.rivals
            if rival in steps
        },
    )


def compare(result: SetResult, name: str, peer: str) -> Comparison | None:
    """Return the first contender's time over its rival's, or over the yardstick's; None where one was not measured.

    From the rounds where both ran in one batch, else the quotient of their ratios to the yardstick. (The
    yardstick runs in every batch, so that a ratio to it is always of pairs.)
    """
    own, other = result.figures(name), result.figures(peer)
    if own is None or other is None:
        return None
    if peer == YARDSTICK or own.batch != other.batch:
        ratio = own.ratio.median / other.ratio.median
        return Comparison(ratio, own.ratio_of_fastest / other.ratio_of_fastest)
    return own.against[peer]


def write(
    path: Path,
    machine: dict[str, object],
    settings: dict[str, object],
    results: list[SetResult],
    targets: list[dict[str, object]],
) -> None:
    """Write a run as JSON. Times are seconds, rates bytes a second; samples have a file of their own."""
    document = {
        "format": 2,
        "yardstick": YARDSTICK,
        "headline": "ratio: median of the rounds' own ratios, as drift of a shared machine cancels in a pair",
        "machine": machine,
        "settings": settings,
        "sets": [asdict(result) for result in results],
        "targets": targets,
    }
    documents.write(path, document)


def measured_on(run: Mapping[str, Any]) -> str:
    """Return a line on what a stored run was measured on."""
    machine = run["machine"]
    threads = "" if machine["device"].startswith("cuda") else f"{machine['threads']} thread(s), "
    return f"{machine['device_name']}, {threads}{run['settings']['dtype']}, torch {machine['versions']['torch']}"


def sets_of(run: Mapping[str, Any]) -> list[SetResult]:
    """Return the results of a stored run."""
    return [
        SetResult(**{**found, "copy": Summary(**found["copy"]), "rows": [_row_of(row) for row in found["rows"]]})
        for found in run["sets"]
    ]


def _row_of(record: Mapping[str, Any]) -> Row:
    """Return a stored row."""
    figures = record["figures"]
    if figures is None:
        return Row(**record)
    summaries = {name: Summary(**figures[name]) for name in ("step_s", "host_s", "ratio", "host_ratio")}
    against = {rival: Comparison(**found) for rival, found in figures["against"].items()}
    return Row(**{**record, "figures": Figures(**{**figures, **summaries, "against": against})})


def write_samples(path: Path, samples: Mapping[str, Sequence[Mapping[str, Sequence[Timing]]]]) -> None:
    """Write every round's [step, host] in seconds: by set, batch and contender."""
    sets = [
        {
            "set": name,
            "batches": [
                [{"contender": contender, "samples": timings} for contender, timings in batch.items()]
                for batch in batches
            ],
        }
        for name, batches in samples.items()
    ]
    documents.write(path, {"format": 1, "sets": sets})
