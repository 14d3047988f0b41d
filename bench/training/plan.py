"""Which runs a setting asks for: those of the search, and, by what it chose, those that are judged."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from bench.tasks import SIZES
from bench.training.arms import ARMS
from bench.training.run import Result, Run
from bench.training.settings import TARGET, Setting


@dataclass(frozen=True)
class Point:
    """Of the search."""

    lr: float
    weight_decay: float


def points(setting: Setting, task: str, rule: str) -> list[Point]:
    """Return the points of a task's search for an optimizer."""
    base = SIZES[setting.size][task].lr * (setting.adan_factor if rule == "Adan" else 1.0)
    return [Point(base * factor, decay) for factor in setting.lr_factors for decay in setting.weight_decays]


def search(setting: Setting, tasks: Sequence[str]) -> list[Run]:
    """Return the runs of the search: the same number of points and seeds for every arm that searches."""
    searching = [ARMS[name] for name in setting.arms if ARMS[name].searches]
    return [
        Run(task, arm.name, point.lr, point.weight_decay, seed, judged=False)
        for seed in range(setting.search_seeds)
        for task in tasks
        for arm in searching
        for point in points(setting, task, arm.rule)
    ]


Choices = dict[tuple[str, str], Point]  # by task and arm


def choose(results: Iterable[Result]) -> Choices:
    """Return the point with the lowest mean of final held-out losses, for each task and arm of the search."""
    losses: dict[tuple[str, str], dict[Point, list[float]]] = {}
    for result in results:
        run = result.run
        of_arm = losses.setdefault((run.task, run.arm), {})
        of_arm.setdefault(Point(run.lr, run.weight_decay), []).append(result.final)
    return {key: min(found, key=lambda point: statistics.mean(found[point])) for key, found in losses.items()}


def target(results: Iterable[Result], choices: Choices, task: str, base: str) -> float:
    """Return the held-out loss to which steps are counted: a little more than an optimizer ends with in the search."""
    chosen = choices[task, base]
    return TARGET * statistics.median(
        result.final
        for result in results
        if (result.run.task, result.run.arm, result.run.lr, result.run.weight_decay)
        == (task, base, chosen.lr, chosen.weight_decay)
    )


def judged(setting: Setting, tasks: Sequence[str], choices: Choices) -> list[Run]:
    """Return the runs that are judged: set by set, and all arms of a seed before the next seed.

    Every arm runs with what was chosen for its optimizer alone, so that nothing but the arm differs, and with what was
    chosen for itself where that is another point. There the optimizer alone runs too, last of all, where the arm is
    AGR: a search of few seeds may choose a better point for one of two equal optimizers.
    """
    seeds = [first + place for first in setting.sets for place in range(setting.seeds)]
    runs = []
    for seed, task, name in product(seeds, tasks, setting.arms):
        shared = choices[task, ARMS[name].base]
        for point in dict.fromkeys([shared, choices.get((task, name), shared)]):
            runs.append(Run(task, name, point.lr, point.weight_decay, seed, judged=True))
    for seed, task, name in product(seeds, tasks, setting.arms):
        own = choices.get((task, name))
        if ARMS[name].agr_on and own is not None:
            runs.append(Run(task, ARMS[name].base, own.lr, own.weight_decay, seed, judged=True))
    return [*{run.key: run for run in runs}.values()]
