"""The CPU backend: hands a plan's tensors to the native executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .launch import Launch, Numbers
from .native import native
from .options import number
from .scaling import Scaling
from .tensors import Binding, planned, rows

if TYPE_CHECKING:
    from .clipping import Clipping


class CpuLaunch(Launch):
    """One step of all parameters that the CPU backend updates, whatever their types, in one plan."""

    backend = "cpu"

    def __init__(self, rule: str, bindings: Sequence[Binding], clip: bool) -> None:
        super().__init__(bindings)
        _C = native()
        self.gradients = _C.GradientTable()
        self._executor = _C.CpuExecutor(_C.Plan(planned(bindings), clip), rows(rule, bindings))
        self._numbers: list[Numbers] = []
        self._factor = 1.0

    def prepare(self, groups: Sequence[dict[str, Any]], numbers: Sequence[Numbers], scaling: Scaling) -> None:
        """Take all numbers as Python's; see Launch.prepare."""
        self._numbers = [tuple([x if type(x) is float else number(x) for x in of_group]) for of_group in numbers]
        self._factor = scaling.factor()

    def square_sum(self) -> float:
        """Return the sum of the squares of all gradients' elements; see Launch.square_sum."""
        return float(self._executor.reduce(self.gradients, torch.get_num_threads())) / self._factor**2

    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Make the step and count it where no signal handler can come between; see Launch.update."""
        assert clipping.coefficient is not None
        factor = number(clipping.coefficient) / self._factor
        self._executor.update(self.gradients, self._numbers, factor, torch.get_num_threads(), counted)
