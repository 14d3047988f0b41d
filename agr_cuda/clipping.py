"""Clip by the global L2 norm of all gradients of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch


@dataclass
class Clipping:
    """The clipping of one step: its settings, coefficient and norm."""

    #: The largest norm allowed; 0 does not clip.
    max_grad_norm: float = 0.0
    #: The number added to the norm before dividing by it.
    eps: float = 0.0
    #: The factor for every unscaled gradient; None if the step's only launch computes the norm and this factor itself.
    coefficient: float | Tensor | None = 1.0
    #: The norm; None if nothing is clipped or the launch computes it.
    norm: float | Tensor | None = None
    #: The tensor in which the launch leaves the square of the norm, if the launch computes it.
    squares: Tensor | None = None
    #: Whether every launch has reduced its gradients, so that only updates are left.
    reduced: bool = False

    def measured_norm(self) -> Tensor | None:
        """Return the norm as a float64 tensor, or None if clipping is off."""
        if self.squares is not None:
            with torch.no_grad():
                return self.squares.sqrt()
        if self.norm is None or isinstance(self.norm, Tensor):
            return None if self.norm is None else self.norm.detach()
        return torch.tensor(self.norm, dtype=torch.float64, device="cpu")


def prepare_clipping(launches: Sequence[Launch], max_grad_norm: float, eps: float) -> Clipping:
    """Return how a step clips, which it does unless `max_grad_norm` is 0; see `clip_by_norm`."""
    return clip_by_norm(launches, max_grad_norm, eps) if max_grad_norm else Clipping()


def clip_by_norm(launches: Sequence[Launch], max_grad_norm: float, eps: float) -> Clipping:
    """Return how to clip to a norm of `max_grad_norm`.

    Unless a single launch computes the norm itself, this first reduces all gradients.
    """
    if len(launches) == 1 and launches[0].squares is not None:
        return Clipping(max_grad_norm, eps, None, squares=launches[0].squares)
    norm = global_norm(launches)
    return Clipping(max_grad_norm, eps, clip_coefficient(norm, max_grad_norm, eps), norm, reduced=True)


def global_norm(launches: Sequence[Launch]) -> float | Tensor:
    """Return the global L2 norm of all unscaled gradients.

    It is a tensor if the reference backend or a GPU computes a part of it, so that the host does not wait for it.
    """
    squares: Any = 0.0
    for launch in launches:
        launch_squares = launch.square_sum()
        if isinstance(launch_squares, Tensor) and isinstance(squares, Tensor):
            squares = squares.to(launch_squares.device)
        squares = launch_squares + squares
    # Not squares**0.5 of a tensor, which is not rounded as kernels round a square root.
    norm: float | Tensor = squares.sqrt() if isinstance(squares, Tensor) else squares**0.5
    return norm


def clip_coefficient(norm: float | Tensor, max_grad_norm: float, eps: float) -> float | Tensor:
    """Return min(1, max_grad_norm / (norm + eps)): a tensor if `norm` is one, and NaN if `norm` is NaN."""
    divisor = norm + eps
    if isinstance(divisor, Tensor):
        # A number divided by a tensor would be multiplied by its reciprocal, which rounds otherwise than kernels do.
        quotients = torch.full_like(divisor, max_grad_norm).div(divisor)
        return torch.where(divisor == 0, 1.0, quotients).clamp(max=1.0)
    quotient = max_grad_norm / divisor if divisor != 0 else 1.0
    return 1.0 if quotient > 1.0 else quotient
