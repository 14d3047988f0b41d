"""The CPU backend: hands a plan's tensors to the native executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .binding import Binding, planned, rows
from .native import native


class CpuLaunch:
    """One step of all parameters that the CPU backend updates, whatever their types, in one plan."""

    backend = "cpu"

    def __init__(self, rule: str, bindings: Sequence[Binding], clip: bool) -> None:
        _C = native()
        self.gradients = _C.GradientTable()
        self._executor = _C.CpuExecutor(_C.Plan(planned(bindings), clip), rows(rule, bindings))

    def square_sum(self) -> float:
        """Return the sum of the squares of all gradients' elements."""
        return float(self._executor.reduce(self.gradients, torch.get_num_threads()))

    def update(
        self,
        numbers: Sequence[tuple[float, ...]],
        clip: float,
        counted: Sequence[dict[str, Any]],
        fresh: set[int],
        stepped: Sequence[int],
    ) -> None:
        """Make the step. `clip` multiplies every gradient.

        Then, where no signal handler can come between, count the step of the groups `counted`, and take what was
        `stepped` out of the set `fresh`.
        """
        self._executor.update(self.gradients, numbers, clip, torch.get_num_threads(), counted, fresh, stepped)
