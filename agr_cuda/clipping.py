"""Clipping by the global L2 norm of all gradients of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch


@dataclass
class Clipping:
    """How one step clips its gradients."""

    #: What the norm is clipped to; 0 does not clip.
    max_grad_norm: float = 0.0
    #: What is added to the norm.
    eps: float = 0.0
    #: What every unscaled gradient is multiplied by; None where the step's one launch takes the norm and finds it.
    coefficient: float | Tensor | None = 1.0
    #: The norm, or the square of it where the launch takes it.
    norm: float | Tensor | None = None
    squares: Tensor | None = None

    @property
    def in_launch(self) -> bool:
        """Whether the step's one launch takes the norm itself."""
        return self.coefficient is None

    def measured(self) -> Tensor | None:
        """Return the norm as a float64 tensor, or None where nothing was clipped."""
        if self.squares is not None:
            with torch.no_grad():
                return self.squares.sqrt()
        if self.norm is None or isinstance(self.norm, Tensor):
            return None if self.norm is None else self.norm.detach()
        return torch.tensor(self.norm, dtype=torch.float64, device="cpu")


def clipping(launches: Sequence[Launch], max_grad_norm: float, eps: float) -> Clipping:
    """Return how a step clips, having reduced all gradients if it takes that to know."""
    if not max_grad_norm:
        return Clipping()
    if len(launches) == 1 and launches[0].squares is not None:
        return Clipping(max_grad_norm, eps, None, squares=launches[0].squares)
    norm = global_norm(launches)
    return Clipping(max_grad_norm, eps, clip_coefficient(norm, max_grad_norm, eps), norm)


def global_norm(launches: Sequence[Launch]) -> float | Tensor:
    """Return the norm of all unscaled gradients.

    It is a tensor if the reference or a GPU has a part in it, so that the host need not wait for it.
    """
    squares: Any = 0.0
    for launch in launches:
        of_launch = launch.square_sum()
        if isinstance(of_launch, Tensor) and isinstance(squares, Tensor):
            squares = squares.to(of_launch.device)
        squares = of_launch + squares
    norm: float | Tensor = squares**0.5
    return norm


def clip_coefficient(norm: float | Tensor, max_grad_norm: float, eps: float) -> float | Tensor:
    """Return min(1, max_grad_norm / (norm + eps)), NaN for a norm of NaN; a tensor for a tensor."""
    divisor = norm + eps
    if isinstance(divisor, Tensor):
        return torch.where(divisor == 0, 1.0, max_grad_norm / divisor).clamp(max=1.0)
    quotient = max_grad_norm / divisor if divisor != 0 else 1.0
    return 1.0 if quotient > 1.0 else quotient
