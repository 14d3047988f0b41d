"""Measure what AGR does to updates: on which tensors, and how much.

Small models train on real data with AdamW, without AGR. Beside each parameter, at the same gradients, the optimizer
takes the step that it would take with AGR, with averages of its own. The relative change of the update is

    ||update with AGR - update without|| / ||update without||

The same for abs-sums of other scopes than the tensor, which are not AGR as published: of a row (the first dimension),
of the tensors of a parameter group (matrices with embeddings, and all others), and of the whole model. Weight decay is
no part of the updates. Beside the change stands what AGR takes of the gradient's abs-sum, the sum of a_i^2, whose
inverse is the effective number of elements.

Writes effect-TAG.json and effect-TAG.png into the output folder. Exit code 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import agr_cuda
from bench.commands import options
from bench.measuring import machine
from bench.reporting import documents, drawing, terminal
from bench.reporting.effect_rows import EffectRow
from bench.tasks import TASKS
from bench.tasks.task import Task

RULES = {"AdamW": agr_cuda.AdamW, "Adan": agr_cuda.Adan}
#: Steps before the first measurement: averages begin as the first gradient, and take that long to be averages.
WARMUP = 20
MEASUREMENTS = 20


@dataclass(frozen=True)
class Named:
    """A parameter of a model."""

    name: str
    kind: str  # of agr_cuda.parameter_groups
    parameter: nn.Parameter


Gradients = Sequence[Tensor]
Scope = Callable[[Sequence[Named], Gradients], list[Tensor]]


def _psi(gradient: Tensor, total: Tensor) -> Tensor:
    return gradient * (1 - gradient.abs() / total.clamp_min(torch.finfo(total.dtype).tiny))


def of_tensor(named: Sequence[Named], gradients: Gradients) -> list[Tensor]:
    """Return gradients regularized by each tensor's abs-sum: AGR."""
    return [_psi(g, g.abs().sum()) for g in gradients]


def of_row(named: Sequence[Named], gradients: Gradients) -> list[Tensor]:
    """Return gradients regularized by the abs-sums of rows; those of a vector are the vector."""
    return [
        _psi(g, g.abs().sum(tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g.abs().sum())
        for g in gradients
    ]


def of_group(named: Sequence[Named], gradients: Gradients) -> list[Tensor]:
    """Return gradients regularized by the abs-sums of two groups: matrices and embeddings, and all others."""
    group = [n.kind in ("matrix", "embedding") for n in named]
    sums = [g.abs().sum() for g in gradients]
    totals = {
        which: torch.stack([s for s, w in zip(sums, group, strict=True) if w == which]).sum() for which in set(group)
    }
    return [_psi(g, totals[which]) for g, which in zip(gradients, group, strict=True)]


def of_model(named: Sequence[Named], gradients: Gradients) -> list[Tensor]:
    """Return gradients regularized by the abs-sum of all."""
    total = torch.stack([g.abs().sum() for g in gradients]).sum()
    return [_psi(g, total) for g in gradients]


SCOPES: dict[str, Scope] = {"tensor": of_tensor, "row": of_row, "group": of_group, "model": of_model}


class Shadow:
    """The updates that an optimizer takes at given gradients: steps of parameters that begin at 0 each time."""

    def __init__(self, rule: str, named: Sequence[Named], lr: float) -> None:
        self.parameters = [nn.Parameter(torch.zeros_like(n.parameter)) for n in named]
        self._optimizer = RULES[rule](self.parameters, lr=lr, weight_decay=0.0, agr=False, backend="reference")

    @torch.no_grad()
    def updates(self, gradients: Gradients) -> list[Tensor]:
        """Return the updates at these gradients, which count in the averages."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.zero_()
            parameter.grad = gradient
        self._optimizer.step()
        return [parameter.detach().clone() for parameter in self.parameters]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        type=options.key_of("task", TASKS),
        default=[*TASKS],
        help=f"what is trained: {', '.join(TASKS)} (default: all)",
    )
    options.add_counts(parser, {"steps": (300, "training steps of each task")})
    parser.add_argument("--seed", type=options.natural_int, default=0, metavar="N", help="seed (default: 0)")
    parser.add_argument("--threads", type=options.positive_int, default=1, metavar="COUNT", help="threads (default: 1)")
    options.add_output(parser)


def named_parameters(model: nn.Module) -> list[Named]:
    """Return a model's parameters with their kinds."""
    kinds = agr_cuda.parameter_groups(model).kinds
    return [Named(name, kinds[name], parameter) for name, parameter in model.named_parameters()]


def measure(task: Task, steps: int, seed: int) -> list[EffectRow]:
    """Train a task by AdamW, and return a row for each parameter, rule and scope."""
    torch.manual_seed(seed)
    model = task.model()
    named = named_parameters(model)
    trainer = agr_cuda.AdamW(agr_cuda.parameter_groups(model, weight_decay=0.01), lr=task.lr, agr=False)
    shadows = {(rule, scope): Shadow(rule, named, task.lr) for rule in RULES for scope in ("none", *SCOPES)}
    measured = {max(WARMUP, steps * (i + 1) // MEASUREMENTS) for i in range(MEASUREMENTS)}
    changes: dict[tuple[str, str], list[list[float]]] = {
        key: [[] for _ in named] for key in shadows if key[1] != "none"
    }
    removed: list[list[float]] = [[] for _ in named]
    for step, batch in zip(range(1, steps + 1), task.batches(seed), strict=False):
        trainer.zero_grad()
        torch.autograd.backward(task.loss(model, batch))
        gradients = [n.parameter.grad.detach().clone() for n in named if n.parameter.grad is not None]
        updates = {
            (rule, scope): shadow.updates(gradients if scope == "none" else SCOPES[scope](named, gradients))
            for (rule, scope), shadow in shadows.items()
        }
        if step in measured:
            for place, found in zip(removed, agr_cuda.coefficients(model).values(), strict=True):
                place.append(found.removed)
            for (rule, scope), places in changes.items():
                for place, ours, plain in zip(places, updates[rule, scope], updates[rule, "none"], strict=True):
                    place.append((ours - plain).norm().item() / plain.norm().item())
        trainer.step()
    return [
        EffectRow(
            task.name,
            n.name,
            n.kind,
            n.parameter.numel(),
            statistics.median(removed[i]),
            rule,
            scope,
            statistics.median(places[i]),
            max(places[i]),
        )
        for (rule, scope), places in changes.items()
        for i, n in enumerate(named)
    ]


@dataclass(frozen=True)
class Law:
    """change = factor * removed ** exponent, by least squares of logarithms over tensors."""

    rule: str
    factor: float
    exponent: float
    r_squared: float
    tensors: int


def fit(rows: Sequence[EffectRow], rule: str) -> Law:
    """Return the law of AGR's change for a rule."""
    points = [
        (math.log(row.removed), math.log(row.change))
        for row in rows
        if row.rule == rule and row.scope == "tensor" and row.change > 0 and row.removed > 0
    ]
    x, y = ([point[i] for point in points] for i in (0, 1))
    slope, intercept = statistics.linear_regression(x, y)
    return Law(rule, math.exp(intercept), slope, statistics.correlation(x, y) ** 2, len(points))


def kinds_table(rows: Sequence[EffectRow], rule: str) -> terminal.Table:
    """Return a row for each task and kind of parameter."""
    title = f"relative change of {rule}'s update by AGR, and by abs-sums of other scopes; medians of tensors"
    made = terminal.table(title, ["task", "kind"], ["tensors", "elements", "AGR takes", *SCOPES])
    for task in dict.fromkeys(row.task for row in rows):
        for kind in dict.fromkeys(row.kind for row in rows):
            alike = [row for row in rows if (row.task, row.kind, row.rule) == (task, kind, rule)]
            of = {scope: [row for row in alike if row.scope == scope] for scope in SCOPES}
            if not alike:
                continue
            sizes = [row.elements for row in of["tensor"]]
            size = f"{min(sizes):,}" + (f" to {max(sizes):,}" if max(sizes) > min(sizes) else "")
            taken = statistics.median(row.removed for row in of["tensor"])
            shares = [f"{statistics.median(row.change for row in found):.2%}" for found in of.values()]
            made.add_row(task, kind, str(len(sizes)), size, f"{taken:.2%}", *shares)
    return made


def run(args: argparse.Namespace) -> int:
    """Run the measurement. Returns 0."""
    torch.set_num_threads(args.threads)
    console = terminal.console()
    rows = [row for name in args.tasks for row in measure(TASKS[name], args.steps, args.seed)]
    laws = [fit(rows, rule) for rule in RULES]
    for rule in RULES:
        console.print(kinds_table(rows, rule))
    for law in laws:
        console.print(
            f"{law.rule}: change = {law.factor:.2f} * (sum of a_i^2) ^ {law.exponent:.2f}, "
            f"R2 {law.r_squared:.3f}, {law.tensors} tensors",
            highlight=False,
        )
    document = {
        "format": 1,
        "command": "effect",
        "machine": machine.describe(torch.device("cpu")),
        "settings": {"tasks": args.tasks, "steps": args.steps, "seed": args.seed},
        "laws": [vars(law) for law in laws],
        "rows": [vars(row) for row in rows],
    }
    path = args.out / f"effect-{args.tag}.json"
    documents.write(path, document)
    console.print(f"Wrote {drawing.draw(path, 'effect_chart')}", highlight=False, soft_wrap=True)
    return 0
