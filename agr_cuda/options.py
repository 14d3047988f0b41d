"""The values of options: what is in range, and how errors show what is not."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

#: The options of a group that are numbers, besides betas; those that are booleans; and those of them that may be None.
NUMBERS = ("lr", "eps", "weight_decay")
FLAGS = ("agr", "amsgrad", "no_prox", "maximize", "capturable", "differentiable", "foreach", "fused")
UNDECIDED = ("foreach", "fused")


def number(value: Any) -> float:
    """Return an option's value, which may be a tensor of one element, as a number."""
    if type(value) is float:
        return value
    return float(value.item() if isinstance(value, Tensor) else value)


def number_or_tensor(value: Any) -> Any:
    """Return a tensor as it is, and whatever else is a number (of NumPy, say) as Python's own type."""
    return value if isinstance(value, Tensor) or type(value) in (float, int) else float(value)


def scalar_or_number(value: Any, keeps_tensor: bool) -> Any:
    """Return an option's value as a number, or if it `keeps_tensor` that is one, without dimensions."""
    return value.reshape(()) if keeps_tensor and isinstance(value, Tensor) else number(value)


def make_plain(options: dict[str, Any]) -> None:
    """Make the checked options of a group Python's own numbers, booleans and tuples, and tensors.

    They may come from a configuration (as OmegaConf's lists, or NumPy's numbers), and be saved in a checkpoint, which
    torch.load takes only if it knows all of its types.
    """
    for name in NUMBERS:
        options[name] = number_or_tensor(options[name])
    options["betas"] = tuple(map(number_or_tensor, options["betas"]))
    for name in FLAGS:
        if options.get(name) is not None:
            options[name] = bool(options[name])


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number or a tensor, ValueError unless the tensor has one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; it must have 1 element")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a boolean or, where the program may leave the choice open, None."""
    if value is None and name in UNDECIDED:
        return
    if isinstance(value, Tensor) or value not in (False, True):  # NumPy's booleans are equal to Python's
        allowed = "None, True or False" if name in UNDECIDED else "True or False"
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")


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
