"""Describe the tensors of a step: a parameter, its gradient, and the optimizer state of its update rule.

Every other module relies on this description: checks, plans, the rows of the native executors, Triton's tables, the
reference backend and state dicts. State of a new type or shape is added here.
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
    """The declaration of one optimizer-state tensor that an update rule keeps for every parameter."""

    #: The key in the parameter's state dictionary.
    key: str
    #: An average has the parameter's shape and memory layout; a count is a scalar, the number of steps.
    role: Literal["average", "count"] = "average"
    #: The value of every element before the parameter's first step.
    initial: float = 0.0
    #: The dtype; None means the parameter's.
    dtype: torch.dtype | None = None
    #: Whether a checkpoint that has the other state tensors of a parameter may omit this one.
    optional: bool = False

    def dtype_for(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of this tensor for `parameter`."""
        return parameter.dtype if self.dtype is None else self.dtype

    def create(self, parameter: Tensor, device: torch.device) -> Tensor:
        """Return a new tensor with the values from before the first step of `parameter`."""
        dtype = self.dtype_for(parameter)
        if self.role == "count":
            return torch.full((), self.initial, dtype=dtype, device=device)
        return self.fill_initial(torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format))

    def fill_initial(self, tensor: Tensor) -> Tensor:
        """Reset `tensor` in place to its value before the first step, and return it."""
        return tensor.fill_(complex(self.initial, self.initial) if tensor.is_complex() else self.initial)


class GradientKind(NamedTuple):
    """The properties that a plan requires of a parameter's gradient, which may be another tensor in every step."""

    class_: type
    dtype: torch.dtype
    #: Whether it is a tensor in a device's memory, from which it can be copied.
    plain: bool
    #: Whether its elements are in that memory with their own values, in the same order as the parameter's.
    same_layout: bool

    @classmethod
    def of(cls, parameter: Tensor, gradient: Tensor) -> GradientKind:
        """Return the kind of an existing gradient."""
        plain = not is_wrapper(gradient) and not gradient._is_zerotensor()
        same = plain and not gradient.is_neg() and same_layout(parameter, gradient)
        return cls(type(gradient), gradient.dtype, plain, same)


@dataclass(eq=False)
class Binding:
    """One parameter of an optimizer, with everything that a step reads and writes for it."""

    index: int  # the parameter's index, counted over all groups
    group: int  # the index of its parameter group
    place: str  # the parameter's name in messages, such as "group 0, parameter 3 ('lm_head.weight')"
    parameter: Tensor
    gradient: GradientKind
    state: dict[str, Any]
    specs: tuple[StateTensor, ...]  # in the order in which the update rule takes them
    backend: str
    regularize: bool  # whether AGR applies
    amsgrad: bool
    #: A staging buffer in the parameter's memory layout. A gradient of another layout is copied into it in each step.
    staged: Tensor | None = None

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The state tensors of the parameter's shape, in the order in which the update rule takes them."""
        return tuple(self.state[spec.key] for spec in self.specs if spec.role == "average")

    @property
    def count(self) -> Tensor | None:
        """The parameter's own step count; None if its group holds the count, as for Adan."""
        return next((self.state[spec.key] for spec in self.specs if spec.role == "count"), None)

    @property
    def plain(self) -> bool:
        """Whether the parameter is an ordinary tensor in a device's memory; see `is_plain`."""
        return is_plain(self.parameter)


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Turn off inference mode and gradient recording for the tensors made within.

    Later steps change these tensors in place, and those steps may run in another mode than this one.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def plan_entries(bindings: Sequence[Binding]) -> list[tuple[int, int, bool]]:
    """Return what a native Plan needs for each tensor: elements, bytes per gradient element, whether AGR applies."""
    return [(b.parameter.numel(), b.gradient.dtype.itemsize, b.regularize) for b in bindings]


def executor_rows(rule: str, bindings: Sequence[Binding]) -> list[tuple[Any, ...]]:
    """Return the native executors' row for each tensor: rule, group, index, parameter, gradient's dtype, state."""
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
    """Whether `tensor` is a wrapper subclass such as DTensor, which has a `__torch_dispatch__` of its own."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is an ordinary tensor, whose elements are in a device's memory with their own values."""
    if is_wrapper(tensor):
        return False
    # A zero tensor (torch._efficientzerotensor) has no memory, and the memory of a negative view holds -x.
    return not tensor._is_zerotensor() and not tensor.is_neg()


def has_memory(tensor: Tensor) -> bool:
    """Whether the memory of `tensor` is there, and was not taken away to make room."""
    return is_wrapper(tensor) or tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of `tensor` fill one contiguous range of memory without gaps or overlaps, in any order."""
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
    """Whether `a` and `b`, which have the same shape, store their elements in the same order in memory."""
    if a.layout != b.layout:
        return False
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.numel() == 0 or all(mine == theirs for n, mine, theirs in sizes if n > 1)
