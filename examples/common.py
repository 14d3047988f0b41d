"""Code shared by the examples: the compared optimizers, their parameter groups, and timed training steps."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import agr_cuda


@dataclass(frozen=True)
class Variant:
    """One of the compared optimizers, and the style of its curves."""

    label: str
    rule: str
    agr: bool
    colour: str

    @property
    def line(self) -> dict[str, Any]:
        """The matplotlib properties of its curves: thin for AGR, on top of thick ones, so that both stay visible."""
        return {
            "label": self.label,
            "color": self.colour,
            "linewidth": 1.4 if self.agr else 4.0,
            "zorder": 3 if self.agr else 2,
        }

    @property
    def without_agr(self) -> Variant:
        """The same optimizer without AGR."""
        return next(other for other in VARIANTS.values() if other.rule == self.rule and not other.agr)


VARIANTS = {
    "adamw": Variant("AdamW", "adamw", agr=False, colour="#56a8dd"),
    "agr-adamw": Variant("AGR-AdamW", "adamw", agr=True, colour="#004c7f"),
    "adan": Variant("Adan", "adan", agr=False, colour="#f0a050"),
    "agr-adan": Variant("AGR-Adan", "adan", agr=True, colour="#b03a00"),
}

#: What --state-dtype can be, as the optimizers take it.
STATE_DTYPES: dict[str, torch.dtype | str] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}


def backend_name(options: argparse.Namespace) -> str | None:
    """Return --backend as the optimizers take it: None chooses for each parameter."""
    return None if options.backend == "auto" else str(options.backend)


def parameter_groups(model: nn.Module, weight_decay: float, agr: bool) -> list[dict[str, Any]]:
    """Return parameter groups according to whether weight decay and AGR should apply.

    - Matrices and convolution kernels: decayed and regularized.
    - Biases, and the weights of normalization layers: not decayed, since decay would pull the latter to 0. AGR stays
      on, as in the paper, which applies it to every tensor; it reduces an n-element vector's gradient by about 1/n.
    - Tensors of one element: without AGR, which would make their gradient exactly 0, so that they would never train.
    """
    matrices: dict[str, Any] = {"params": [], "weight_decay": weight_decay, "agr": agr}
    vectors: dict[str, Any] = {"params": [], "weight_decay": 0.0, "agr": agr}
    single: dict[str, Any] = {"params": [], "weight_decay": 0.0, "agr": False}
    for parameter in model.parameters():
        group = single if parameter.numel() == 1 else vectors if parameter.dim() == 1 else matrices
        group["params"].append(parameter)
    return [group for group in (matrices, vectors, single) if group["params"]]


def make_optimizer(variant: Variant, model: nn.Module, options: argparse.Namespace) -> agr_cuda.AdamW | agr_cuda.Adan:
    """Return the variant's optimizer over the model's parameters."""
    groups = parameter_groups(model, options.weight_decay, variant.agr)
    shared: dict[str, Any] = {
        "max_grad_norm": options.max_grad_norm,
        "backend": backend_name(options),
        "state_dtype": STATE_DTYPES[options.state_dtype],
    }
    if variant.rule == "adan":
        return agr_cuda.Adan(groups, lr=options.adan_lr, **shared)
    return agr_cuda.AdamW(groups, lr=options.adamw_lr, **shared)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the memory of all state: averages, scales, masters and step counts."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def warmup_cosine(steps: int, warmup: float, floor: float = 0.1) -> Callable[[int], float]:
    """Return a function from the step to the learning rate's factor: a linear rise, then a cosine from 1 to `floor`."""
    rise = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        fallen = min(1.0, (step - rise) / max(1, steps - rise))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * fallen))

    return factor


@dataclass(eq=False)
class Run:
    """A model that is trained with one optimizer, and all measurements made during training. Times are in seconds."""

    variant: Variant
    seed: int
    model: nn.Module
    optimizer: agr_cuda.AdamW | agr_cuda.Adan
    scheduler: LambdaLR
    train_loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    evaluated_at: list[int] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=dict)

    def advance(self, compute_loss: Callable[[nn.Module], Tensor], now: Callable[[], float]) -> None:
        """Make one training step: forward pass, backward pass, and optimizer step, which includes clipping."""
        begin = now()
        loss = compute_loss(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        before = now()
        self.optimizer.step()
        after = now()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.train_loss.append(loss.item())
        self.step_seconds.append(after - begin)
        self.optimizer_seconds.append(after - before)

    def record(self, **measures: float) -> None:
        """Record the results of an evaluation after the steps made so far."""
        self.evaluated_at.append(len(self.train_loss))
        for name, value in measures.items():
            self.measures.setdefault(name, []).append(value)

    def optimizer_shares(self) -> list[float]:
        """Return the optimizer's share of the time of each step."""
        return [own / all for own, all in zip(self.optimizer_seconds, self.step_seconds, strict=True)]

    def last(self, measure: str) -> float:
        """Return the result of the last evaluation, or NaN before the first."""
        return self.measures.get(measure, [math.nan])[-1]


def start_runs(model: nn.Module, options: argparse.Namespace, steps: int, seed: int) -> list[Run]:
    """Return a run for each selected optimizer, all starting from the weights of `model`."""
    runs = []
    for name in options.optimizers:
        variant, own = VARIANTS[name], copy.deepcopy(model)
        optimizer = make_optimizer(variant, own, options)
        schedule = LambdaLR(optimizer, warmup_cosine(steps, options.warmup))
        runs.append(Run(variant, seed, own, optimizer, schedule))
    return runs


def in_turn(runs: Sequence[Run], step: int) -> Iterable[Run]:
    """Yield the runs in rotating order, so that no run always finds the caches left by the same other run."""
    first = step % len(runs)
    yield from runs[first:]
    yield from runs[:first]


def clock(on: torch.device) -> Callable[[], float]:
    """Return a clock that synchronizes with the device before it reads the time in seconds."""

    def now() -> float:
        if on.type != "cpu":
            torch.accelerator.synchronize(on)
        return time.perf_counter()

    return now


def by_variant(runs: Iterable[Run]) -> dict[Variant, list[Run]]:
    """Group runs, which may be of several seeds, by optimizer."""
    groups: dict[Variant, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups
