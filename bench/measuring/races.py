"""Interleaved timing: every contender once a round, in an order shuffled anew each round."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.measuring.clocks import Action, Clock, Timing

FEWEST_ROUNDS = 3  # taken even where the time is up
SHORT_STEP = 0.01  # seconds; longer steps stream through the caches, whatever was in them


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Lane:
    """A contender in a race: its step, and what surrounds each step outside the clock."""

    name: str
    step: Action
    before: Action = _nothing
    after: Action = _nothing
    repeats: int = 0

    def visit(self, clock: Clock) -> Timing:
        """Take one step, and if it was short, `repeats` more of them; return the last one's timing.

        In training, the backward pass has just gone over parameters and gradients when the step begins. Here the
        other contenders have, with their own state: the step before brings this one's back into the caches. The
        surroundings are undone whether or not a step fails.
        """
        self.before()
        try:
            timing = clock(self.step)
            if timing.step < SHORT_STEP:
                for _ in range(self.repeats):
                    timing = clock(self.step)
            return timing
        finally:
            self.after()


@contextmanager
def collector_off() -> Iterator[None]:
    """Collect garbage once, then hold Python's collector off, so that it interrupts no timed step."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def race(
    lanes: Sequence[Lane],
    clock: Clock,
    *,
    rounds: int,
    seconds: float,
    new_round: Callable[[int], object],
    between: Action = _nothing,
    seed: int = 0,
) -> dict[str, list[Timing]]:
    """Time every lane once a round, up to `rounds` rounds or until `seconds` have passed.

    `new_round(number)` runs before each round and `between()` after it, outside the clock. The order is
    shuffled for each round (from a fixed seed), so that no lane always follows the same one and meets the
    caches or spinning threads that this one leaves behind. At least FEWEST_ROUNDS rounds are taken, if
    `rounds` allows.

    Returns for each lane its timings in the order of the rounds, so that equal places pair up.
    """
    timings: dict[str, list[Timing]] = {lane.name: [] for lane in lanes}
    order = list(lanes)
    shuffle = random.Random(seed).shuffle
    with collector_off():
        end = time.perf_counter() + seconds
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() >= end:
                break
            new_round(number)
            shuffle(order)
            for lane in order:
                timings[lane.name].append(lane.visit(clock))
            between()
    return timings
