"""What mixed precision asks of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .options import number


@dataclass
class Scaling:
    """What gradients are divided by, and whether to make no step at all: set by torch.amp.GradScaler."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def asked_of(cls, optimizer: torch.optim.Optimizer) -> Scaling:
        """Return what the scaler has set on the optimizer, perhaps nothing."""
        return cls(_tensor(getattr(optimizer, "grad_scale", None)), _tensor(getattr(optimizer, "found_inf", None)))

    def skips(self) -> bool:
        """Whether the step is not to be made. Waits for the device that knows."""
        return self.found_inf is not None and number(self.found_inf) != 0

    def factor(self) -> float:
        """Return what the scale multiplied gradients by. Waits for the device that knows."""
        return 1.0 if self.grad_scale is None else number(self.grad_scale)

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return both as float32 tensors of one element on `device`, without waiting for them."""
        return _single(self.grad_scale, device), _single(self.found_inf, device)


def _tensor(value: Any) -> Tensor | None:
    """Return an attribute that a scaler has set: a tensor, or a plain number where no gradient was looked at."""
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _single(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None or (value.device == device and value.dtype == torch.float32):
        return value
    return value.to(device=device, dtype=torch.float32, non_blocking=True)
