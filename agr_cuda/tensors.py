"""What one tensor of a step consists of: a parameter, its gradients, and the state that its rule keeps for it.

Everything else reads this description: checks, plans, the rows of native executors, Triton's tables, the reference and
state dicts. State of another type or shape is added here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a rule keeps for a parameter from step to step, as the rule declares it."""

    #: In the parameter's state.
    key: str
    #: An average has an element for each of the parameter's, in the same order in memory; a count is one number.
    role: Literal["average", "count"] = "average"
    #: What it is filled with before the parameter's first step.
    initial: float = 0.0
    #: None is the parameter's type.
    dtype: torch.dtype | None = None
    #: Whether a checkpoint that has the other tensors of a parameter may lack this one.
    may_lack: bool = False

    def dtype_for(self, parameter: Tensor) -> torch.dtype:
        """Return the type of this tensor for `parameter`."""
        return parameter.dtype if self.dtype is None else self.dtype

    def made_for(self, parameter: Tensor, device: torch.device) -> Tensor:
        """Return the tensor before the first step of `parameter`."""
        dtype = self.dtype_for(parameter)
        if self.role == "count":
            return torch.full((), self.initial, dtype=dtype, device=device)
        return self.fill(torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format))

    def fill(self, tensor: Tensor) -> Tensor:
        """Make `tensor` what it is before the first step, in place."""
        return tensor.fill_(complex(self.initial, self.initial) if tensor.is_complex() else self.initial)


class GradientKind(NamedTuple):
    """What a plan knows of a parameter's gradients, of which each step may bring another or none."""

    class_: type
    dtype: torch.dtype
    #: Whether they are tensors in a device's memory, not wrappers around others.
    plain: bool
    #: Whether their elements lie in memory as the parameter's do.
    same_layout: bool

    @classmethod
    def of(cls, parameter: Tensor, gradient: Tensor) -> GradientKind:
        """Return the kind of a gradient that is there."""
        return cls(type(gradient), gradient.dtype, is_plain(gradient), same_layout(parameter, gradient))


@dataclass(eq=False)
class Binding:
    """One parameter of an optimizer, and all that a step reads and writes for it."""

    index: int  # counted over all groups
    group: int  # the index of its group
    place: str  # how messages name it: "group 0, parameter 3 ('lm_head.weight')"
    parameter: Tensor
    gradient: GradientKind
    state: dict[str, Any]
    states: tuple[StateTensor, ...]  # in the order of the rule
    backend: str
    regularize: bool  # with AGR
    amsgrad: bool
    #: What a gradient of another memory layout is copied into before each step, in the parameter's.
    staged: Tensor | None = None

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The state tensors of the parameter's shape, in the order of the rule."""
        return tuple(self.state[spec.key] for spec in self.states if spec.role == "average")

    @property
    def count(self) -> Tensor | None:
        """The parameter's own step count; None where its group has it."""
        return next((self.state[spec.key] for spec in self.states if spec.role == "count"), None)

    @property
    def plain(self) -> bool:
        """Whether the parameter is a tensor in a device's memory, not a wrapper around others."""
        return is_plain(self.parameter)


@contextmanager
def made_for_later() -> Iterator[None]:
    """Make tensors that later steps change, in whatever mode of autograd those and this are made."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def planned(bindings: Sequence[Binding]) -> list[tuple[int, int, bool]]:
    """Return what native plans take of each tensor: elements, bytes of a gradient's element, whether AGR applies."""
    return [(b.parameter.numel(), b.gradient.dtype.itemsize, b.regularize) for b in bindings]


def rows(rule: str, bindings: Sequence[Binding]) -> list[tuple[Any, ...]]:
    """Return what native executors take of each tensor: rule, group, index, parameter, gradient's type, state."""
    return [
        (
            f"{rule}_amsgrad" if b.amsgrad else rule,
            b.group,
            b.index,
            b.parameter,
            str(b.gradient.dtype),
            b.averages,
            b.count,
        )
        for b in bindings
    ]


def is_wrapper(tensor: Tensor) -> bool:
    """Whether `tensor` stands for others, as DTensor and its like do, which dispatch for themselves."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is one in a device's memory."""
    if is_wrapper(tensor):
        return False
    # Zeros without memory, and views that stand for their negative.
    return not tensor._is_zerotensor() and not tensor.is_neg()


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of `tensor` fill a stretch of memory, in whatever order, each exactly once."""
    if tensor.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if size == 0:
            return True
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether `a` and `b`, of the same shape, have their elements in the same order in memory."""
    if a.layout != b.layout:
        return False
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.numel() == 0 or all(mine == theirs for n, mine, theirs in sizes if n > 1)
