"""The values of options: what is in range, and how errors show what is not."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor


def number(value: Any) -> float:
    """Return an option's value, which may be a tensor of one element, as a number."""
    return float(value.item() if isinstance(value, Tensor) else value)


def number_or_tensor(value: Any) -> Any:
    """Return a tensor as it is, and whatever else is a number (of NumPy, say) as Python's."""
    return value if isinstance(value, float | int | Tensor) else float(value)


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number or a tensor, ValueError unless the tensor has one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; it must have 1 element")
    elif not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")


def check_nonnegative(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is at least 0 (NaN is not)."""
    check_number(name, value)
    if not value >= 0.0:
        raise ValueError(f"{name} is {shown(value)}; it must be at least 0")


def check_betas(values: Any, count: int) -> None:
    """Raise ValueError unless `values` are `count` numbers in [0, 1)."""
    if not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"betas is {shown(values)}; it must be a tuple of {count} numbers")
    for i, value in enumerate(values):
        check_number(f"betas[{i}]", value)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"betas[{i}] is {shown(value)}; it must be at least 0 and less than 1")


def shown(value: Any) -> str:
    """Return `value` as a message shows it."""
    return str(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
