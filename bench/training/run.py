"""One training: a task, an arm, a learning rate, a weight decay and a seed; and what came of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.tasks import SIZES
from bench.tasks.task import Batch, Task
from bench.training.arms import ARMS, flip_a_bit
from bench.training.settings import Setting
from bench.training.sharpness import largest_eigenvalue, perturbed_increase

PERTURBATIONS = (0.1, 0.3)  # shares of each tensor's norm
SHARPNESS_SEED = 10**9  # of the training batches on which it is measured: the same ones for all runs
LAST = 0.1  # the share of steps over whose end the training loss is the mean


@dataclass(frozen=True)
class Run:
    """A training that is asked for. Judged ones are measured more closely than those of the search."""

    task: str
    arm: str
    lr: float
    weight_decay: float
    seed: int
    judged: bool

    @property
    def key(self) -> str:
        """What tells it from other runs of the same setting."""
        return f"{self.task} {self.arm} {self.lr:.6g} {self.weight_decay:.6g} {self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of a run. A number is None where it is not finite, or was not measured.

    Attributes:
        run: what was run.
        held_out: the held-out loss at each of the setting's evaluations.
        training: the mean training loss over the last steps.
        score: of the task, at the end.
        eigenvalue: the largest of the Hessian at the end.
        increases: of the training loss by perturbations of sizes PERTURBATIONS.
        seconds: that it took.
    """

    run: Run
    held_out: list[float | None]
    training: float | None
    score: float | None
    eigenvalue: float | None
    increases: list[float | None]
    seconds: float

    @property
    def final(self) -> float:
        """The last held-out loss; infinite for a run that diverged."""
        last = self.held_out[-1]
        return math.inf if last is None else last

    @property
    def best(self) -> float:
        """The lowest held-out loss."""
        return min((loss for loss in self.held_out if loss is not None), default=math.inf)

    def record(self) -> dict[str, Any]:
        """Return it as what JSON has."""
        return {**asdict(self.run), **{name: value for name, value in vars(self).items() if name != "run"}}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Result:
        """Return what `record` returned for it."""
        of_run = {name: record[name] for name in Run.__dataclass_fields__}
        return cls(Run(**of_run), **{name: record[name] for name in cls.__dataclass_fields__ if name != "run"})


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor of a step's learning rate: it rises linearly, and falls to 0 as half a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def finite(value: float) -> float | None:
    """Return a number, or None for one that JSON does not have."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def _mean(measure: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batches: Sequence[Batch]) -> float:
    model.eval()
    values: list[float] = [measure(model, batch).item() for batch in batches]
    model.train()
    return statistics.fmean(values)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return tuple(part.to(device) for part in batch)


def _sharpness(task: Task, model: nn.Module, device: torch.device) -> tuple[float, list[float]]:
    """Return the Hessian's largest eigenvalue, and the increases of the loss by perturbations."""
    batch = _moved(next(task.batches(SHARPNESS_SEED)), device)
    parameters = [*model.parameters()]
    model.eval()  # a batch's own statistics would be another function of the weights than the one that is used

    def loss() -> Tensor:
        return task.loss(model, batch)

    return largest_eigenvalue(loss, parameters), [perturbed_increase(loss, parameters, s) for s in PERTURBATIONS]


def train(run: Run, setting: Setting, device: torch.device) -> Result:
    """Run a training. Deterministic on a CPU with one thread, for a version of PyTorch and a kind of processor."""
    begin = time.perf_counter()
    task, arm, steps = SIZES[setting.size][run.task], ARMS[run.arm], setting.steps[run.task]
    torch.manual_seed(run.seed)
    model = task.model()
    if arm.flips:
        flip_a_bit(model, lambda: task.loss(model, next(task.batches(run.seed))))
    model.to(device)
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = arm.optimizer(model, run.lr, run.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, setting.warmup))
    held_out = [_moved(batch, device) for batch in task.held_out()]
    evaluated = {round(steps * (i + 1) / setting.evaluations) for i in range(setting.evaluations)}
    losses: list[float | None] = []
    last: list[Tensor] = []
    for step, batch in zip(range(1, steps + 1), task.batches(run.seed), strict=False):
        optimizer.zero_grad()
        loss = task.loss(model, _moved(batch, device))
        torch.autograd.backward(loss)
        if arm.treatment is not None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    arm.treatment(parameter.grad, generator)
        optimizer.step()
        schedule.step()
        if step > (1 - LAST) * steps:
            last.append(loss.detach())
        if step in evaluated:
            losses.append(finite(_mean(task.loss, model, held_out)))
    training = torch.stack(last).mean().item()
    score = _mean(task.score[1], model, held_out) if task.score else None
    eigenvalue, increases = _sharpness(task, model, device) if run.judged and losses[-1] is not None else (None, [])
    return Result(
        run,
        losses,
        finite(training),
        score,
        None if eigenvalue is None else finite(eigenvalue),
        [finite(increase) for increase in increases],
        time.perf_counter() - begin,
    )
