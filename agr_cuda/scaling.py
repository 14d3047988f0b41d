"""The gradient scale and the overflow flag that torch.amp.GradScaler hands to a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .options import number


@dataclass
class Scaling:
    """The values that torch.amp.GradScaler has set for one step; None where it has not set them."""

    #: The factor by which the gradients are multiplied; the step divides by it.
    grad_scale: Tensor | float | None
    #: Nonzero if a gradient is inf or NaN; the step is skipped then.
    found_inf: Tensor | None

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer) -> Scaling:
        """Return the values that the scaler has set as attributes of the optimizer."""
        return cls(
            _as_tensor(getattr(optimizer, "grad_scale", None)), _as_tensor(getattr(optimizer, "found_inf", None))
        )

    def skips_step(self) -> bool:
        """Whether the step must be skipped. Synchronizes with the device of `found_inf`."""
        return self.found_inf is not None and number(self.found_inf) != 0

    def factor(self) -> float:
        """Return the gradient scale as a number, 1 without one. Synchronizes with the device of `grad_scale`."""
        return 1.0 if self.grad_scale is None else number(self.grad_scale)

    def to(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return `grad_scale` and `found_inf` as float32 tensors of one element on `device`, without synchronizing."""
        return _move(self.grad_scale, device), _move(self.found_inf, device)


def _as_tensor(value: Any) -> Tensor | None:
    """Return an attribute set by a scaler as a tensor; it is a plain number if the scaler inspected no gradient."""
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _move(value: Tensor | float | None, device: torch.device) -> Tensor | None:
    if isinstance(value, float):  # filled in on the device, which needs no copy from the host
        return torch.full((), value, dtype=torch.float32, device=device)
    if value is None or (value.device == device and value.dtype == torch.float32):
        return value
    return value.to(device=device, dtype=torch.float32, non_blocking=True)
