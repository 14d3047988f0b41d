"""Medians, their intervals, quartiles, minima and paired ratios of interleaved timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median, quantiles
from typing import NamedTuple

CONFIDENCE = 0.95  # with which an interval holds what it is of


@dataclass(frozen=True)
class Summary:
    """Median, quartiles and smallest of `count` measurements, in the measurements' unit."""

    median: float
    lower: float  # first quartile
    upper: float  # third quartile
    smallest: float
    count: int


class Interval(NamedTuple):
    """Where something lies, with CONFIDENCE."""

    lower: float
    upper: float


def summarize(values: Sequence[float]) -> Summary:
    """Summarize at least one value; quartiles interpolate linearly between values, as numpy's default."""
    if not values:
        raise ValueError("summarize needs at least one value, got none")
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], values[0], 1)
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return Summary(middle, lower, upper, min(values), len(values))


def median_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval in which the median lies of what the values are a sample of, however that is distributed.

    Quartiles say how much single values differ, and do not come closer with more of them; this does. The median lies
    between the k-th smallest and the k-th largest of n values unless fewer than k of them fall on one of its sides, as
    with n tosses of a coin. None for fewer than six values: their smallest and largest are not certain enough.
    """
    count, outside, rank = len(values), 0, 0
    while 2 * (outside + comb(count, rank)) / 2**count <= 1 - CONFIDENCE:
        outside += comb(count, rank)
        rank += 1
    ordered = sorted(values)
    return Interval(ordered[rank - 1], ordered[-rank]) if rank else None


def paired_ratios(values: Sequence[float], yardstick: Sequence[float]) -> Summary:
    """Return median and quartiles of values[i] / yardstick[i], both taken in round i.

    This is the headline ratio. On a shared machine the speed drifts by tens of percent over seconds to
    minutes: a slow spell hits both halves of a round's pair and cancels in their quotient, while the two
    separate medians of `ratio_of_medians` may come from rounds of different spells.
    """
    if len(values) != len(yardstick):
        raise ValueError(f"paired ratios need as many values as yardsticks, got {len(values)} and {len(yardstick)}")
    return summarize([value / unit for value, unit in zip(values, yardstick, strict=True)])


def ratio_of_medians(values: Sequence[float], yardstick: Sequence[float]) -> float:
    """Return median(values) / median(yardstick), for comparison with the headline ratio."""
    return median(values) / median(yardstick)


def ratio_of_fastest(values: Sequence[float], yardstick: Sequence[float]) -> float:
    """Return min(values) / min(yardstick): each at its least disturbed.

    Where other processes take processor time, contenders suffer unequally: one that starts its threads anew
    for every tensor waits for the scheduler each time, and its median may be many times what an idle machine
    would show. A headline ratio that is far from this one says more about the machine than about the code.
    """
    return min(values) / min(yardstick)
