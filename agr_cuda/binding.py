"""A parameter bound to its gradient, its state and the backend that updates it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Binding:
    """One parameter of an optimizer that has a gradient."""

    index: int  # counted over all groups
    group: int  # the index of its group
    place: str  # how messages name it: "group 0, parameter 3 ('lm_head.weight')"
    parameter: Tensor
    keys: tuple[str, ...]  # of its state tensors that have the parameter's shape, in the order of the rule
    backend: str
    state: dict[str, Any]
    regularize: bool  # with AGR
    amsgrad: bool
    fresh: bool = False  # no step has been made with this state yet
    relaid: Tensor | None = None  # a copy of the gradient in the parameter's memory layout, where its own differs

    @property
    def gradient(self) -> Tensor:
        """The gradient, in the parameter's memory layout."""
        gradient = self.parameter.grad if self.relaid is None else self.relaid
        assert gradient is not None
        return gradient

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
    """Return what a plan is told of each tensor: elements, bytes of a gradient's element, whether it is regularized."""
    return [(b.parameter.numel(), b.gradient.element_size(), b.regularize) for b in bindings]


def rows(rule: str, bindings: Sequence[Binding]) -> list[tuple[Any, ...]]:
    """Return what a native executor is told of each tensor: rule, group, parameter, gradient, states, step, fresh."""
    return [
        (
            f"{rule}_amsgrad" if b.amsgrad else rule,
            b.group,
            b.parameter,
            b.gradient,
            tuple(b.state[key] for key in b.keys),
            b.state.get("step"),
            b.fresh,
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
