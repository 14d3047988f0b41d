"""Predictions for a model's plan: the cache model asked about every rule, and about windows and leads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod

from agr_cuda import _C
from agr_cuda.cuda import rehearsal
from agr_cuda.precision import Precision
from agr_cuda.tensors import kernel_types
from bench.cache_model.replay import Machine, Traffic, replay
from bench.workloads.formats import ACCESSES, Format
from bench.workloads.schedule import Tensor
from bench.workloads.shapes import ModelSet

H200 = Machine()
# The sweep's windows as shares of the cache, and leads as shares of what all blocks reduce at once.
SWEPT_WINDOWS = (0.0625, 0.125, 0.25, 0.5, 0.75)
SWEPT_LEADS = (0.0, 0.25, 0.5, 1.0, 1.5)
SWEPT_RULE = "AdamW"  # where a second read costs most
SWEPT_PIECES = 100_000
PIECES = 1_200_000
SAME = 0.001  # reaches that differ by less are equally good: then the smaller window and lead are preferred


@dataclass(frozen=True)
class Limits:
    """How a plan is cut and ordered."""

    chunk_elements: int
    window_bytes: int
    lead_bytes: int


def backend_limits(stored: Format) -> tuple[Limits, int, int]:
    """Return how the cuda backend cuts and orders tensors of this format on an H200.

    Also, how many blocks it has there, and how many bytes they prefetch together.
    """
    precision = Precision(stored.state, stored.master, stored.stochastic)
    types = kernel_types(stored.parameter, stored.gradient, precision)
    with rehearsal():  # whose device has the numbers of an H200
        chunk, window, lead, prefetched, resident, multiprocessors = _C.cuda_limits("adamw", types, 0)
    return Limits(chunk, window, lead), resident * multiprocessors, prefetched


@dataclass(frozen=True)
class Prediction:
    """One replay: what was asked, and what came out."""

    model: ModelSet
    rule: str
    share: float  # of the cache
    limits: Limits
    on_chip_bytes: int
    traffic: Traffic

    def record(self) -> dict[str, object]:
        """Return it ready for JSON."""
        found = self.traffic
        derived = {name: getattr(found, name) for name in ("read", "written", "total", "ceiling", "reach", "hit_share")}
        asked = {"rule": self.rule, "share": self.share, "on_chip_bytes": self.on_chip_bytes}
        return {"set": self.model.name} | asked | asdict(self.limits) | asdict(found) | derived


class Predictor:
    """A GPU with its cache, and a replay for any model, rule and limits. What is not given is the cuda backend's.

    Args:
        stored: As what parameters, gradients and state are stored.
        cache_bytes: The cache's nominal size.
        blocks: How many run at once.
        chunk_elements: Elements of a chunk.
        window_bytes: Gradient that waits for its UPDATE.
        lead_bytes: Gradient of other tasks between a tensor's last REDUCE and first UPDATE.
        on_chip_bytes: What is kept on chip where a prediction asks for that.
        hints: Whether the cache heeds what tasks ask it to keep.
    """

    def __init__(
        self,
        stored: Format,
        *,
        cache_bytes: float = H200.cache_bytes,
        blocks: int | None = None,
        chunk_elements: int | None = None,
        window_bytes: int | None = None,
        lead_bytes: int | None = None,
        on_chip_bytes: int = 0,
        hints: bool = True,
    ) -> None:
        defaults, default_blocks, prefetched = backend_limits(stored)
        self.prefetched = round(prefetched * cache_bytes / H200.cache_bytes)
        self.stored, self.itemsize, self.cache_bytes = stored, stored.gradient.itemsize, cache_bytes
        self.blocks, self.on_chip_bytes, self.hints = blocks or default_blocks, on_chip_bytes, hints
        chunk = chunk_elements or defaults.chunk_elements
        self.wave = self.blocks * chunk * self.itemsize  # bytes of gradient that all blocks reduce at once
        window = round(defaults.window_bytes * cache_bytes / H200.cache_bytes) if window_bytes is None else window_bytes
        self.limits = Limits(chunk, window, self.wave if lead_bytes is None else lead_bytes)

    def predict(
        self, model: ModelSet, rule: str, share: float, limits: Limits, on_chip: int, pieces: int = PIECES
    ) -> Prediction:
        """Make the plan and replay it."""
        tensors: list[Tensor] = [(prod(shape), self.itemsize, True) for shape in model.shapes]
        plan = _C.Plan(tensors, **asdict(limits))
        on = Machine(share * self.cache_bytes, self.blocks, on_chip, limits.window_bytes, self.hints, self.prefetched)
        in_place = rule == "gradients"
        reads = self.stored.bytes_read(rule) / self.itemsize - 1  # all but the gradient
        writes = self.stored.bytes_written(rule) / self.itemsize - in_place
        traffic = replay(tensors, plan.tasks, plan.chunk_elements, reads, writes, on, pieces, in_place)
        return Prediction(model, rule, share, limits, on_chip, traffic)

    def figures(self, model: ModelSet, shares: Sequence[float]) -> list[Prediction]:
        """Return every rule at every share, without and then with what is kept on chip."""
        asked = product(ACCESSES, shares, dict.fromkeys((0, self.on_chip_bytes)))
        return [self.predict(model, rule, share, self.limits, on_chip) for rule, share, on_chip in asked]

    def sweep(self, model: ModelSet, share: float) -> list[Prediction]:
        """Return every window with every lead, the smaller first."""
        windows = [int(part * self.cache_bytes) for part in SWEPT_WINDOWS]
        leads = [int(part * self.wave) for part in SWEPT_LEADS]
        tried = [Limits(self.limits.chunk_elements, *pair) for pair in product(windows, leads)]
        kept = self.on_chip_bytes
        return [self.predict(model, SWEPT_RULE, share, limits, kept, SWEPT_PIECES) for limits in tried]


def best_of(reaches: Sequence[float]) -> int:
    """Return the index of the first that is not below the highest by more than SAME."""
    return next(place for place, reach in enumerate(reaches) if reach >= max(reaches) - SAME)
