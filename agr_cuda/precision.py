"""How a parameter's numbers are stored: the type of its state, a float32 master copy, and how they are rounded.

docs/precision.md describes the options, and lists what each backend takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The value of `state_dtype` that stands for codes of 8 bits; see agr_cuda/quantization.py.
EIGHT_BIT = "8bit"
STATE_DTYPES = (None, torch.float32, torch.bfloat16, EIGHT_BIT)
#: The options of a group that decide how numbers are stored. They are not saved in checkpoints: a checkpoint's state is
#: converted to what the group that loads it says.
PRECISION_OPTIONS = ("state_dtype", "master_weights", "stochastic_rounding")
#: Parameters of these types can have a master copy.
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
#: Parameters of these types can have state of another type than their own.
CONVERTIBLE = (torch.float32, *SIXTEEN_BITS)
#: Parameters with fewer elements keep their state in float32 where it would be 8 bits, as in the 8-bit optimizers of
#: arXiv 2110.02861: it takes little memory, and is of biases and norms, which are sensitive. So do parameters that are
#: not contiguous: blocks are neighbours in memory, and a checkpoint's tensors need not come back in the order in which
#: they were in memory.
SMALLEST_QUANTIZED = 4096


class Precision(NamedTuple):
    """How the numbers of one parameter are stored."""

    #: The dtype of the averages; torch.uint8 stands for codes of 8 bits.
    state: torch.dtype
    #: Whether the parameter is the rounded copy of a float32 master, which is what steps update.
    master: bool = False
    #: Whether what is stored in bfloat16 (the averages, and a parameter without a master) is rounded stochastically.
    stochastic: bool = False

    @property
    def quantized(self) -> bool:
        """Whether averages are stored as codes and scales."""
        return self.state == torch.uint8

    @classmethod
    def of(cls, parameter: Tensor, group: dict[str, Any]) -> Precision:
        """Return how the numbers of `parameter` are stored in a group with these options."""
        master = bool(group["master_weights"]) and parameter.dtype in SIXTEEN_BITS
        state = group["state_dtype"]
        if state is None:
            state = torch.float32 if master else parameter.dtype
        elif state == EIGHT_BIT:
            quantized = parameter.numel() >= SMALLEST_QUANTIZED and parameter.is_contiguous()
            state = torch.uint8 if quantized else torch.float32
        rounds = state == torch.bfloat16 or (parameter.dtype == torch.bfloat16 and not master)
        return cls(state, master, bool(group["stochastic_rounding"]) and rounds)


def says_state(group: dict[str, Any]) -> bool:
    """Whether a group's options say of what type its state is."""
    return group["state_dtype"] is not None or bool(group["master_weights"])


def check_precision_options(group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for a `state_dtype` or a `rounding_seed`, RuntimeError for a contradiction."""
    state_dtype = group["state_dtype"]
    if not any(state_dtype is allowed or state_dtype == allowed for allowed in STATE_DTYPES):
        raise ValueError(
            f"state_dtype is {state_dtype!r}; it must be None (the parameter's), torch.float32, torch.bfloat16 or "
            f"{EIGHT_BIT!r}"
        )
    seed = group["rounding_seed"]
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"rounding_seed is {seed!r}; it must be an integer")
    if not 0 <= int(seed) < 2**53:
        raise ValueError(f"rounding_seed is {seed}; it must be at least 0 and less than 2**53")
    if group.get("differentiable"):
        for name in PRECISION_OPTIONS:
            if group[name]:
                raise RuntimeError(f"differentiable=True and {name}={group[name]!r} exclude each other")


def check_precision(place: str, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
    """Raise RuntimeError if the precision options of a group make no sense for its parameters.

    Args:
        place: the group's name in messages.
        parameters: all parameters of the group.
        group: the options.
    """
    if not parameters:
        return
    dtypes = [parameter.dtype for parameter in parameters]
    found = ", ".join(sorted({str(dtype) for dtype in dtypes}))
    if group["state_dtype"] is not None:
        for i, dtype in enumerate(dtypes):
            if dtype not in CONVERTIBLE:
                raise RuntimeError(
                    f"state_dtype is {group['state_dtype']!r} in {place}, and its parameter {i} is {dtype}; only the "
                    "state of float32, bfloat16 and float16 parameters can have another type: state_dtype=None"
                )
    if group["master_weights"] and not any(dtype in SIXTEEN_BITS for dtype in dtypes):
        raise RuntimeError(
            f"master_weights is True in {place}, whose parameters are {found}; only bfloat16 and float16 parameters "
            "have master weights: master_weights=False"
        )
    if group["stochastic_rounding"] and not any(Precision.of(parameter, group).stochastic for parameter in parameters):
        raise RuntimeError(
            f"stochastic_rounding is True in {place}, where nothing is stored in bfloat16: its parameters are {found}"
            + (" with master weights" if group["master_weights"] else "")
            + f", state_dtype is {group['state_dtype']!r}. Only bfloat16 parameters without master weights, and "
            "bfloat16 state, are rounded stochastically: stochastic_rounding=False"
        )
