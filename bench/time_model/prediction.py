"""Predictions for a model's plan: the time model asked about GPUs, rules and kernels, and about changes and guesses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch

from agr_cuda import _C
from bench.cache_model.prediction import Predictor
from bench.time_model.code import IDEAS, KERNELS, Code, changes
from bench.time_model.gpu import Gpu
from bench.time_model.replay import Outcome, Replay
from bench.workloads.formats import Format
from bench.workloads.schedule import Schedule, Tensor
from bench.workloads.shapes import ModelSet

UNCHANGED = "as it is"
# What the constants without a good source decide, as other values of the GPU's fields.
GUESSES: dict[str, dict[str, float]] = {
    "fence 1000 ns instead of 400": {"fence_ns": 1000.0},
    "fence 150 ns": {"fence_ns": 150.0},
    "cache latency under load x1 instead of x1.3": {"loaded": 1.0},
    "cache latency under load x2": {"loaded": 2.0},
    "DRAM latency x1.5": {"dram_ns": 1.5},
    "cycles x1.5": {"issue": 1.5},
    "atomics on one address 4 ns apart instead of 2": {"atomic_gap_ns": 4.0},
    "half of the cache holds": {"l2_share": 0.5},
    "the cache holds nothing": {"l2_share": 0.0},
}
FACTORS = ("dram_ns",)  # given as a multiple of what the GPU has
# Of a small step, chance decides a few percent: it is the median of several replays, of about so many tasks together.
REPLAYED_TASKS = 30_000
MOST_REPLAYS = 5


@dataclass(frozen=True)
class Prediction:
    """One replay: what was asked, and what came out."""

    model: ModelSet
    gpu: Gpu
    kernel: str
    variant: str  # a change, an idea or a guess, or UNCHANGED
    code: Code
    outcome: Outcome

    def record(self) -> dict[str, object]:
        """Return it ready for JSON."""
        found = self.outcome
        asked = {
            "set": self.model.name,
            "gpu": self.gpu.title,
            "rule": self.code.rule,
            "kernel": self.kernel,
            "variant": self.variant,
        }
        derived = {
            "total": found.total,
            "hit_share": found.hit_share,
            "share_of_copy": found.share_of_copy(self.gpu),
            "share_of_copy_with_launch": found.share_of_copy(self.gpu, launch=True),
        }
        return asked | asdict(found) | derived


def schedule_for(gpu: Gpu, code: Code, model: ModelSet, dtype: torch.dtype) -> Schedule:
    """Return the plan that the cuda backend makes for this GPU."""
    chunk = code.chunk_bytes // code.itemsize
    blocks = gpu.multiprocessors * code.blocks
    limits = Predictor(Format.uniform(dtype), cache_bytes=gpu.l2_bytes, blocks=blocks, chunk_elements=chunk).limits
    tensors: list[Tensor] = [(prod(shape), code.itemsize, True) for shape in model.shapes]
    return Schedule(tensors, _C.Plan(tensors, code.clips, **asdict(limits)).tasks, chunk)


def median_outcome(gpu: Gpu, code: Code, schedule: Schedule) -> Outcome:
    """Return the replay of median time: chance decides when blocks start, and which of DRAM's channels they meet."""
    replays = min(MOST_REPLAYS, REPLAYED_TASKS // len(schedule.tasks)) | 1
    outcomes = [Replay(gpu, code, schedule, seed).run() for seed in range(replays)]
    return sorted(outcomes, key=lambda outcome: outcome.ns)[replays // 2]


class Steps:
    """Predictions for GPUs and kernels of one type of elements.

    Args:
        dtype: Storage type of parameters, gradients and state.
        clips: Whether gradients are clipped by their norm.
    """

    def __init__(self, dtype: torch.dtype, *, clips: bool = False) -> None:
        self.dtype, self.clips = dtype, clips

    def predict(
        self,
        gpu: Gpu,
        model: ModelSet,
        rule: str,
        kernel: str,
        variant: str = UNCHANGED,
        fields: Mapping[str, Any] | None = None,
        guess: Mapping[str, float] | None = None,
    ) -> Prediction:
        """Replay a step, with these fields of the code, and of the GPU, instead of its own."""
        code = replace(KERNELS[kernel](rule, self.dtype.itemsize, self.clips), **(fields or {}))
        other: dict[str, Any] = dict(guess or {})
        for name in FACTORS:
            if name in other:
                other[name] *= getattr(gpu, name)
        outcome = median_outcome(replace(gpu, **other), code, schedule_for(gpu, code, model, self.dtype))
        return Prediction(model, gpu, kernel, variant, code, outcome)

    def changes(self, gpu: Gpu, model: ModelSet, rule: str) -> Iterable[Prediction]:
        """Yield 0.1.0's step, one with each change alone, and one with all; then one with each idea besides."""
        first, now = "0.1.0", "words"
        yield self.predict(gpu, model, rule, first)
        for name, fields in changes(KERNELS[first](rule, self.dtype.itemsize, self.clips)).items():
            yield self.predict(gpu, model, rule, first, name, fields)
        yield self.predict(gpu, model, rule, now)
        for name, fields in IDEAS.items():
            yield self.predict(gpu, model, rule, now, name, fields)

    def sensitivity(self, gpu: Gpu, model: ModelSet, rule: str, kernel: str) -> Iterable[Prediction]:
        """Yield the step, and one with each other guess."""
        yield self.predict(gpu, model, rule, kernel)
        for name, guess in GUESSES.items():
            yield self.predict(gpu, model, rule, kernel, name, guess=guess)
