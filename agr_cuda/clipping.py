"""Clipping by the global L2 norm of all gradients of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .launch import Scaling
from .options import number
from .schedule import Schedule


def global_norm(
    schedule: Schedule, groups: Sequence[dict[str, Any]], numbers: Sequence[Sequence[tuple[Any, ...]]], scaling: Scaling
) -> float | Tensor:
    """Return the norm of all unscaled gradients.

    It is a tensor if the reference or a GPU has a part in it, so that the host need not wait for it.

    Args:
        schedule: what the step launches.
        groups: the optimizer's.
        numbers: of each launch on a GPU, those of each group.
        scaling: of mixed precision.
    """
    squares: Any = 0.0
    if schedule.cpu is not None:
        squares = squares + schedule.cpu.square_sum()
    if schedule.reference is not None:
        squares = squares + schedule.reference.square_sum(groups)
    if scaling.grad_scale is not None and schedule.on_host:
        squares = squares / number(scaling.grad_scale) ** 2
    for launch, of_groups in zip(schedule.launches, numbers, strict=True):
        of_launch = launch.reduce(of_groups, scaling)
        squares = of_launch + (squares.to(of_launch.device) if isinstance(squares, Tensor) else squares)
    norm: float | Tensor = squares**0.5
    return norm


def clip_coefficient(norm: float | Tensor, max_grad_norm: float, eps: float) -> float | Tensor:
    """Return min(1, max_grad_norm / (norm + eps)), NaN for a norm of NaN; a tensor for a tensor."""
    divisor = norm + eps
    if isinstance(divisor, Tensor):
        return torch.where(divisor == 0, 1.0, max_grad_norm / divisor).clamp(max=1.0)
    quotient = max_grad_norm / divisor if divisor != 0 else 1.0
    return 1.0 if quotient > 1.0 else quotient
