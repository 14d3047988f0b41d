"""The values of options: what is in range, and how errors show what is not."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def number(value: Any) -> float:
    """Return an option's value, which may be a tensor of one element, as a number."""
    return float(value.item() if isinstance(value, Tensor) else value)


def check_nonnegative(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is one number of at least 0 (NaN is not)."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; it must have 1 element")
    if not value >= 0.0:
        raise ValueError(f"{name} is {shown(value)}; it must be at least 0")


def check_betas(values: Any, count: int) -> None:
    """Raise ValueError unless `values` are `count` numbers in [0, 1)."""
    if len(values) != count:
        raise ValueError(f"betas is {shown(values)}; it must be {count} numbers")
    for i, value in enumerate(values):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"betas[{i}] is a tensor of shape {tuple(value.shape)}; it must have 1 element")
        if not 0.0 <= value < 1.0:
            raise ValueError(f"betas[{i}] is {shown(value)}; it must be at least 0 and less than 1")


def shown(value: Any) -> str:
    """Return `value` as a message shows it."""
    return str(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
