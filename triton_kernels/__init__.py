"""The Triton executor of a plan, installed as agr_cuda.triton_kernels. Imports triton.

Two launches update all tensors of all groups in a step: `reduce_step`, then `update_step`. To regularize gradients in
place, `regularize_step` takes the place of the second.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from ..precision import Precision
from . import tables
from .reduce import reduce_step
from .regularize import regularize_step
from .update import update_step

__all__ = [
    "COEFFICIENTS", "GROUP", "REDUCE_CONSTANTS", "constants", "reduce_step", "regularize_step", "update_step",
]  # fmt: skip

#: The 64-bit words of a row: in the table of coefficients, and in the groups' table.
COEFFICIENTS, GROUP = tables.COEFFICIENTS.value, tables.GROUP.value

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.uint8: tl.uint8,
}

#: Which of the constants reductions take.
REDUCE_CONSTANTS = ("ADAN", "GRADIENT", "TYPE")


def constants(rule: str, parameter: torch.dtype, gradient: torch.dtype, precision: Precision) -> dict[str, Any]:
    """Return the compile-time constants of an update of parameters of one type, with gradients of one type."""
    return {
        "ADAN": rule == "adan",
        "PARAMETER": _TYPES[parameter],
        "GRADIENT": _TYPES[gradient],
        "TYPE": tl.float64 if parameter == torch.float64 else tl.float32,
        "STATE": _TYPES[precision.state],
        "MASTER": precision.master,
        "STOCHASTIC": precision.stochastic,
    }
