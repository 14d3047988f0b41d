"""The CPU backend, which passes a plan's tensors to the native executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import Hyperparameters, Launch
from .native import native
from .options import number
from .scaling import Scaling
from .tensors import Binding, executor_rows, plan_entries

if TYPE_CHECKING:
    from .clipping import Clipping


class CpuLaunch(Launch):
    """The update of all parameters of the CPU backend, of all dtypes, in one plan."""

    def __init__(self, rule: str, bindings: Sequence[Binding], clip: bool) -> None:
        super().__init__(bindings)
        _C = native()
        self.gradients = _C.GradientTable()
        self._executor = _C.CpuExecutor(_C.Plan(plan_entries(bindings), clip), executor_rows(rule, bindings))
        self._hyperparameters: list[Hyperparameters] = []
        self._factor = 1.0

    def prepare(
        self, groups: Sequence[dict[str, Any]], hyperparameters: Sequence[Hyperparameters], scaling: Scaling
    ) -> None:
        """Convert all hyperparameters to Python numbers; see Launch.prepare."""
        self._hyperparameters = [
            tuple([x if type(x) is float else number(x) for x in values]) for values in hyperparameters
        ]
        self._factor = scaling.factor()

    def square_sum(self) -> float:
        """Return the sum of the squares of all unscaled gradients; see Launch.square_sum."""
        return float(self._executor.reduce(self.gradients, torch.get_num_threads())) / self._factor**2

    def sums(self) -> Tensor:
        """Return the sums of each gradient; see Launch.sums."""
        self._executor.reduce(self.gradients, torch.get_num_threads())
        sums = torch.empty(2, len(self.bindings), dtype=torch.float64, device="cpu")
        self._executor.sums(sums)
        return sums

    def set_abs_sums(self, abs_sums: Tensor) -> None:
        """Take the abs-sums of whole tensors; see Launch.set_abs_sums."""
        self._executor.set_abs_sums(abs_sums.cpu())

    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Update and count the step in one native call, which no signal handler can interrupt; see Launch.update."""
        assert clipping.coefficient is not None
        factor = number(clipping.coefficient) / self._factor
        self._executor.update(self.gradients, self._hyperparameters, factor, torch.get_num_threads(), counted)
