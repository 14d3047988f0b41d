"""The Triton executor of a plan, installed as agr_cuda.triton_kernels. Imports triton.

Two launches make a step of all tensors of all groups: `reduce_step`, then `update_step`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from . import tables
from .reduce import reduce_step
from .update import update_step

__all__ = ["GROUP", "NUMBERS", "ROW", "constants", "reduce_step", "update_step"]

#: Words that a tensor takes in its table and in that of numbers, and a group in its own.
ROW, NUMBERS, GROUP = tables.ROW.value, tables.NUMBERS.value, tables.GROUP.value

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def constants(rule: str, parameter: torch.dtype, gradient: torch.dtype) -> dict[str, Any]:
    """Return what the kernels are compiled for: a rule, and types of parameters (and their state) and gradients."""
    return {
        "ADAN": rule == "adan",
        "PARAMETER": _TYPES[parameter],
        "GRADIENT": _TYPES[gradient],
        "TYPE": tl.float64 if parameter == torch.float64 else tl.float32,
    }
