"""What finished runs say: paired differences between arms, their intervals, tests and verdicts.

The design is written down in docs/evidence.md. Differences are paired by seed: both runs begin with the same weights
and see the same batches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from scipy import stats

from bench.training.arms import ARMS
from bench.training.plan import Point, choose, target
from bench.training.run import PERTURBATIONS, Result
from bench.training.settings import SMALLEST_OF_INTEREST, Setting

LEVEL = 0.05  # of tests, after Holm's correction
CONFIDENCE = 0.95
POWER = 0.8  # with which the smallest detectable effect would have been found

LOWER, HIGHER, NONE, OPEN = "lower", "higher", "none of interest", "open"


@dataclass(frozen=True)
class Measure:
    """A number of a run, of which lower is better unless said otherwise."""

    name: str
    of: Callable[[Result, float], float | None]  # of a run and its task's target
    relative: bool = True  # whether differences are shares of the base's mean


def steps_to(result: Result, target: float, steps: int) -> float | None:
    """Return after which step the held-out loss was at the target, between evaluations by a line; None: never."""
    before, step_before = None, 0.0
    for place, loss in enumerate(result.held_out, 1):
        step = steps * place / len(result.held_out)
        if loss is not None and loss <= target:
            if before is None or before == loss:
                return step
            return step_before + (step - step_before) * (before - target) / (before - loss)
        before, step_before = loss, step
    return None


def _magnitude(eigenvalue: float | None) -> float | None:
    return math.log10(abs(eigenvalue)) if eigenvalue else None


def _increase(place: int, result: Result, target: float) -> float | None:
    return result.increases[place] if result.increases else None


def measures(setting: Setting) -> dict[str, Measure]:
    """Return what is compared, the first one being what verdicts are about."""
    pushes = enumerate(PERTURBATIONS)
    found = [
        Measure("final held-out loss", lambda result, target: result.final if math.isfinite(result.final) else None),
        Measure("best held-out loss", lambda result, target: result.best if math.isfinite(result.best) else None),
        Measure("steps to the target", lambda result, target: steps_to(result, target, setting.steps[result.run.task])),
        Measure("training loss", lambda result, target: result.training),
        Measure("error rate", lambda result, target: None if result.score is None else 1 - result.score, False),
        # Logarithms and absolute differences, since the means of eigenvalues and increases may be about 0.
        Measure("largest eigenvalue, log10", lambda result, target: _magnitude(result.eigenvalue), False),
        *(
            Measure(f"increase by a push of {100 * size:g}%", partial(_increase, place), False)
            for place, size in pushes
        ),
    ]
    return {measure.name: measure for measure in found}


FINAL = "final held-out loss"


@dataclass(frozen=True)
class Comparison:
    """An arm's paired differences from another arm.

    Attributes:
        task: what was trained.
        arm: whose difference it is.
        base: from whom.
        measure: of what.
        relative: whether the difference, its interval, spread and detectable size are shares of the base's mean.
        pairs: how many seeds both have.
        base_mean: the base's mean.
        difference: the mean difference.
        lower: end of the mean's interval, by Student's t.
        upper: the other end.
        spread: the standard deviation of the differences.
        p: of the paired t-test, corrected by Holm's method over the tasks.
        detectable: the difference that the test would find with probability POWER, uncorrected.
    """

    task: str
    arm: str
    base: str
    measure: str
    relative: bool
    pairs: int
    base_mean: float
    difference: float
    lower: float
    upper: float
    spread: float
    p: float
    detectable: float

    @property
    def verdict(self) -> str:
        """What the interval and the test say together."""
        if self.p < LEVEL:
            direction = LOWER if self.difference < 0 else HIGHER
            return f"{direction}, below interest" if self.of_no_interest else direction
        return NONE if self.of_no_interest else OPEN

    @property
    def of_no_interest(self) -> bool:
        """Whether the whole interval is within the smallest effect of interest."""
        return self.lower > -SMALLEST_OF_INTEREST and self.upper < SMALLEST_OF_INTEREST


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    corrected, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected


def _compared(task: str, arm: str, base: str, measure: Measure, pairs: Sequence[tuple[float, float]]) -> Comparison:
    """Return the comparison of at least two pairs, (arm, base), before the correction."""
    base_mean = statistics.fmean(pair[1] for pair in pairs)
    unit = abs(base_mean) if measure.relative and base_mean else 1.0
    differences = [(a - b) / unit for a, b in pairs]
    count, mean, spread = len(pairs), statistics.fmean(differences), statistics.stdev(differences)
    error = spread / math.sqrt(count)
    edge = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    p = 2 * stats.t.sf(abs(mean) / error, count - 1) if error else float(mean == 0)
    detectable = (stats.t.ppf(1 - LEVEL / 2, count - 1) + stats.t.ppf(POWER, count - 1)) * error
    low, high = mean - edge * error, mean + edge * error
    return Comparison(
        task, arm, base, measure.name, measure.relative, count, base_mean, mean, low, high, spread, p, detectable
    )


class Runs:
    """Judged runs, found by task, arm, point and seed.

    Args:
        document: what `python -m bench train` wrote.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.setting = Setting.of_record(document["design"])
        results = [Result.of_record(record) for record in document["runs"]]
        searched = [result for result in results if not result.run.judged]
        self.choices = choose(searched)
        # Those whose search is over, for each of the arms' optimizers.
        bases = {ARMS[name].base for name in self.setting.arms}
        tasks = document["settings"]["tasks"]
        self.tasks = [task for task in tasks if all((task, base) in self.choices for base in bases)]
        self.targets = {
            key: target(searched, self.choices, *key) for key in self.choices if key[1] == ARMS[key[1]].base
        }
        self.measures = measures(self.setting)
        #: The seeds that were asked for.
        self.seeds = {first + k for first in self.setting.sets for k in range(self.setting.seeds)}
        self._of: dict[tuple[str, str, Point], dict[int, Result]] = {}
        for result in results:
            run = result.run
            if run.judged and run.seed in self.seeds:  # a store may hold sets of an earlier command, too
                self._of.setdefault((run.task, run.arm, Point(run.lr, run.weight_decay)), {})[run.seed] = result

    def point(self, task: str, arm: str, own: bool) -> Point:
        """Return where an arm is judged: at what was chosen for itself, or for its optimizer alone."""
        shared = self.choices[task, ARMS[arm].base]
        return self.choices.get((task, arm), shared) if own else shared

    def values(self, task: str, arm: str, measure: str, own: bool = False, at: Point | None = None) -> dict[int, float]:
        """Return a measure of an arm's runs, by seed; without those that do not have it.

        Args:
            task: what was trained.
            arm: by what.
            measure: of what.
            own: whether with what was chosen for the arm itself.
            at: with what, if with neither.
        """
        found = self._of.get((task, arm, at or self.point(task, arm, own)), {})
        of, to = self.measures[measure].of, self.targets[task, ARMS[arm].base]
        return {seed: value for seed, run in found.items() if (value := of(run, to)) is not None}

    def diverged(self, task: str, arm: str, own: bool = False) -> int:
        """Return how many of an arm's runs ended with a loss that is not finite."""
        found = self._of.get((task, arm, self.point(task, arm, own)), {})
        return sum(not math.isfinite(result.final) for result in found.values())

    def compare(
        self,
        arm: str,
        base: str,
        measure: str = FINAL,
        first: int | None = None,
        own: bool = False,
        both_own: bool = False,
    ) -> list[Comparison]:
        """Compare an arm with another in every task where both have at least two seeds in common.

        Args:
            arm: whose differences.
            base: from whom; at what was chosen for its optimizer alone, unless said otherwise.
            measure: of what.
            first: the first seed of the only set that counts (default: all sets).
            own: whether the arm is at what was chosen for itself.
            both_own: whether both are at what was chosen for the arm.
        """
        counts = range(2**62) if first is None else range(first, first + self.setting.seeds)
        found = []
        for task in self.tasks:
            place = self.point(task, arm, own=True) if both_own else None
            ours, others = self.values(task, arm, measure, own, place), self.values(task, base, measure, at=place)
            pairs = [(ours[seed], others[seed]) for seed in sorted(ours.keys() & others.keys()) if seed in counts]
            if len(pairs) > 1:
                found.append(_compared(task, arm, base, self.measures[measure], pairs))
        corrected = holm([comparison.p for comparison in found])
        return [Comparison(**{**vars(c), "p": p}) for c, p in zip(found, corrected, strict=True)]
