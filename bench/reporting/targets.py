"""The design's targets, judged on the results of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.reporting.results import SetResult, compare
from bench.workloads.contenders import YARDSTICK

LARGE_MODEL = 100_000_000  # elements
LARGE_TITLE = "100M elements and more"  # what stands for a large model where none was measured
SMALL_TENSORS = "321x64"  # the set that "about 300 small tensors" stands for
HOST_OF_FUSED = {"kept": 0.12, "new": 0.16}  # host time to torch's fused AdamW's, by whether gradients are kept
MOST_PER_BYTE = 1.15  # time for each byte that must be moved, to that of torch's fused AdamW
WITH_MASTERS = "agr-adamw-bfloat16-master"
MOST_OF_CUDA = 1.25  # the triton backend's time to the cuda backend's


@dataclass(frozen=True)
class Target:
    """One target: `measured` must be at most (or, for at_least, at least) `limit`."""

    text: str
    limit: float
    measured: float | None  # None: this run did not measure it
    at_fastest: float | None = None  # the same from each contender's fastest step
    at_least: bool = False
    disturbed: bool = False  # other work on the machine makes the verdict doubtful
    unit: str = "x"  # "x" a ratio, "%" a share, "B" bytes, "" a count

    def met_by(self, value: float) -> bool:
        """Whether a value meets the limit."""
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def verdict(self) -> str:
        """met, missed or not measured, by the headline; with notes on what makes that doubtful."""
        if self.measured is None:
            return "not measured"
        met = self.met_by(self.measured)
        note = ""
        if self.at_fastest is not None and self.met_by(self.at_fastest) != met:
            note = f", but {'missed' if met else 'met'} by the fastest steps"
        return ("met" if met else "missed") + note + (", on a busy machine" if self.disturbed else "")

    @property
    def shown_limit(self) -> str:
        """The limit as tables show it."""
        return f"{'>=' if self.at_least else '<='} {self.show(self.limit)}"

    def record(self) -> dict[str, object]:
        """Return the target ready for JSON, with what tables show of it."""
        shown = {"limit": self.shown_limit, "measured": self.show(self.measured)}
        return asdict(self) | {"verdict": self.verdict, "shown": shown}

    def show(self, value: float | None) -> str:
        """Return the value with this target's unit."""
        if value is None:
            return "-"
        shown = {
            "x": f"{value:.3f}x",
            "%": f"{100 * value:.1f}%",
            "B": f"{value:.2g} B",
            "": f"{value:.0f}",
        }
        return shown[self.unit]


def _ratio(text: str, limit: float, result: SetResult | None, name: str, peer: str = YARDSTICK) -> Target:
    """Return a target for the ratio of two contenders' times on one set."""
    found = compare(result, name, peer) if result else None
    if result is None or found is None:
        return Target(text, limit, None)
    return Target(text, limit, found.ratio, found.ratio_of_fastest, disturbed=result.disturbed)


def _with_masters(result: SetResult | None, gradient_reads: int = 1) -> Iterator[Target]:
    """Yield the target for float32 masters, where their row was asked for.

    A gradient that leaves the cache before its abs-sum is known is read twice. On a CPU that is so for most of GPT-2's.
    """
    found = result.figures(WITH_MASTERS) if result else None
    if result is None or found is None:
        return
    budget = found.bytes_per_element
    moved = budget + (gradient_reads - 1) * torch.bfloat16.itemsize
    text = f"AGR-AdamW, bfloat16 with float32 masters, {result.title}: time a byte, of {moved:g}, against torch's fused"
    measured = found.ratio_per_byte * budget / moved
    fastest = found.ratio_of_fastest * measured / found.ratio.median
    yield Target(text, MOST_PER_BYTE, measured, fastest, disturbed=result.disturbed)


def cpu_targets(results: Sequence[SetResult]) -> Iterator[Target]:
    """Yield the targets for a CPU, all for float32."""
    by_name = {result.name: result for result in results}
    gpt2, small = by_name.get("gpt2"), by_name.get(SMALL_TENSORS)
    yield _ratio("AGR-AdamW, GPT-2, against torch's fused AdamW", 1.15, gpt2, "agr-adamw")
    yield _ratio("AGR-AdamW, 321 tensors of 64, against torch's fused AdamW", 0.15, small, "agr-adamw")
    yield _ratio("AGR-Adan, GPT-2, against optimi's foreach Adan", 0.4, gpt2, "agr-adan", "optimi-adan-foreach")
    yield _ratio("AGR-Adan, GPT-2, against the reference backend", 0.15, gpt2, "agr-adan", "reference-adan")
    yield from _with_masters(gpt2, gradient_reads=2)


def gpu_targets(results: Sequence[SetResult]) -> Iterator[Target]:
    """Yield the targets for a GPU, all for float32: cuda's bandwidth, speed and host time, then triton's speed."""
    large = [result for result in results if result.elements >= LARGE_MODEL]
    for name, label, budget in (("agr-adamw", "AGR-AdamW", 28), ("agr-adan", "AGR-Adan", 44)):
        text = f"share of the copy bandwidth at {budget} bytes"
        if not large:
            yield Target(f"{label}, {LARGE_TITLE}: {text}", 0.9, None, at_least=True, unit="%")
        for result in large:
            found = result.figures(name)
            share = found.share_of_copy if found else None
            yield Target(f"{label}, {result.title}: {text}", 0.9, share, at_least=True, unit="%")
    for result in large:
        yield from _with_masters(result)
    for result in results:
        yield _ratio(f"AGR-AdamW, {result.title}, against torch's fused AdamW", 1.0, result, "agr-adamw")
    small = next((result.figures("agr-adamw") for result in results if result.name == SMALL_TENSORS), None)
    host_ratio = small.host_ratio.median if small else None
    text = "AGR-AdamW, 321 tensors of 64"
    yield Target(f"{text}: host time against torch's fused AdamW", HOST_OF_FUSED["kept"], host_ratio)
    yield Target(f"{text}: kernel launches a step", 1.0, small.kernels if small else None, unit="")
    for rule in ("AdamW", "Adan"):
        name = f"agr-{rule.lower()}-triton"
        peers = (
            ("the cuda backend", MOST_OF_CUDA, f"agr-{rule.lower()}"),
            (f"optimi's Triton {rule}", 1.0, f"optimi-{rule.lower()}-triton"),
        )
        for peer_label, limit, peer in peers:
            if not large:
                yield Target(f"AGR-{rule} by Triton, {LARGE_TITLE}, against {peer_label}", limit, None)
            for result in large:
                yield _ratio(f"AGR-{rule} by Triton, {result.title}, against {peer_label}", limit, result, name, peer)


def stated_for(tensors: int, elements: int, dtype: str) -> bool:
    """Whether the targets for small tensors are stated for these."""
    return (f"{tensors}x{elements}", dtype) == (SMALL_TENSORS, "float32")


def judge(results: Sequence[SetResult], device_type: str) -> list[Target]:
    """Return the targets of the device's kind with what the run measured."""
    return list((gpu_targets if device_type == "cuda" else cpu_targets)(results))
