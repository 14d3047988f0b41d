"""A row of `python -m bench effect`: what AGR does to a tensor's updates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EffectRow:
    """The change of a parameter's update by an abs-sum of some scope."""

    task: str
    name: str
    kind: str
    elements: int
    removed: float  # the sum of a_i^2 over the tensor, median over the measurements
    rule: str
    scope: str
    change: float  # relative, median over the measurements
    largest_change: float
