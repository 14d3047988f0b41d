"""Check and convert the values of options."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

#: The options of a group that are single numbers; `betas` is a tuple of them.
NUMERIC_OPTIONS = ("lr", "eps", "weight_decay")
#: The options that are booleans.
BOOLEAN_OPTIONS = (
    *("agr", "amsgrad", "no_prox", "maximize", "capturable", "differentiable", "foreach", "fused"),
    *("master_weights", "stochastic_rounding"),
)
#: The boolean options that may be None, to leave the choice to the optimizer.
MAY_BE_NONE = ("foreach", "fused")


def number(value: Any) -> float:
    """Return an option's value, a number or a tensor of one element, as a float."""
    if type(value) is float:
        return value
    return float(value.item() if isinstance(value, Tensor) else value)


def number_or_tensor(value: Any) -> Any:
    """Return a tensor unchanged, and any other number (such as NumPy's) as a Python float or int."""
    return value if isinstance(value, Tensor) or type(value) in (float, int) else float(value)


def scalar_or_number(value: Any, keeps_tensor: bool) -> Any:
    """Return an option's value as a float, or a tensor as a zero-dimensional tensor if `keeps_tensor`."""
    return value.reshape(()) if keeps_tensor and isinstance(value, Tensor) else number(value)


def convert_to_builtin(options: dict[str, Any]) -> None:
    """Convert the checked options of a group in place to Python's numbers, booleans and tuples; tensors stay tensors.

    Options may come from a configuration file, for example as OmegaConf's lists or NumPy's numbers, and are saved in
    checkpoints. torch.load (with weights_only=True) refuses a checkpoint with types that it does not know.
    """
    for name in NUMERIC_OPTIONS:
        options[name] = number_or_tensor(options[name])
    options["betas"] = tuple(map(number_or_tensor, options["betas"]))
    for name in BOOLEAN_OPTIONS:
        if options.get(name) is not None:
            options[name] = bool(options[name])
    options["rounding_seed"] = int(options["rounding_seed"])


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number or a tensor, ValueError unless the tensor has one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; it must have 1 element")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a boolean, or None for an option that may be None."""
    if value is None and name in MAY_BE_NONE:
        return
    if isinstance(value, Tensor) or value not in (False, True):  # NumPy's booleans are equal to Python's
        allowed = "None, True or False" if name in MAY_BE_NONE else "True or False"
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")


def check_nonnegative(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is at least 0. NaN is refused; inf is not."""
    check_number(name, value)
    if not value >= 0.0:
        raise ValueError(f"{name} is {format_value(value)}; it must be at least 0")


def check_betas(values: Any, count: int) -> None:
    """Raise ValueError unless `values` are `count` numbers in [0, 1)."""
    if not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"betas is {format_value(values)}; it must be a tuple of {count} numbers")
    for i, value in enumerate(values):
        check_number(f"betas[{i}]", value)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"betas[{i}] is {format_value(value)}; it must be at least 0 and less than 1")


def format_value(value: Any) -> str:
    """Return `value` as text for a message; a tensor of one element is shown as its number."""
    return str(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
