"""Formats: as what a step's numbers are stored, and the bytes that it must move therefore; see docs/precision.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from agr_cuda.precision import EIGHT_BIT
from agr_cuda.quantization import BLOCK

ACCESSES = {
    "AdamW": 7,
    "Adan": 11,
    "gradients": 2,
}  # tensors a step must read or write: 28, 44 and 8 bytes an element in float32
SCALE_BYTES = torch.float32.itemsize / BLOCK  # an element's share of the scale of its block of codes
MASTER_BYTES = torch.float32.itemsize


def averages(rule: str) -> int:
    """Return how many averages a rule keeps."""
    # A gradient is read, a parameter and each average are read and written.
    return max(0, (ACCESSES[rule] - 3) // 2)


@dataclass(frozen=True)
class Format:
    """As what parameters, gradients and averages are stored; codes of 8 bits are uint8."""

    parameter: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    master: bool = False  # whether there is a float32 copy of each parameter, which the step updates
    stochastic: bool = False  # whether bfloat16 is rounded stochastically

    @classmethod
    def uniform(cls, dtype: torch.dtype) -> Format:
        """Return the format in which everything has one type."""
        return cls(dtype, dtype, dtype)

    @property
    def options(self) -> dict[str, Any]:
        """The options of agr_cuda's optimizers that ask for it."""
        own = torch.float32 if self.master else self.parameter
        state = EIGHT_BIT if self.state == torch.uint8 else None if self.state == own else self.state
        return {"state_dtype": state, "master_weights": self.master, "stochastic_rounding": self.stochastic}

    def bytes_read(self, rule: str) -> float:
        """Return the bytes of an element that a step must read, its gradient once."""
        if rule == "gradients":
            return self.gradient.itemsize
        weight = MASTER_BYTES if self.master else self.parameter.itemsize
        return self.gradient.itemsize + weight + self._average_bytes(rule)

    def bytes_written(self, rule: str) -> float:
        """Return the bytes of an element that a step must write."""
        if rule == "gradients":
            return self.gradient.itemsize
        return self.parameter.itemsize + MASTER_BYTES * self.master + self._average_bytes(rule)

    def bytes_moved(self, rule: str) -> float:
        """Return the bytes of an element that a step must read and write."""
        return self.bytes_read(rule) + self.bytes_written(rule)

    def state_bytes(self, rule: str) -> float:
        """Return the bytes of an element that an optimizer keeps: its averages, and its master if it has one."""
        return self._average_bytes(rule) + MASTER_BYTES * (self.master and averages(rule) > 0)

    def _average_bytes(self, rule: str) -> float:
        """Return the bytes of an element's averages, if its tensor is large enough for codes where they are codes."""
        scale = SCALE_BYTES if self.state == torch.uint8 else 0
        return averages(rule) * (self.state.itemsize + scale)


FLOAT32, BFLOAT16, FLOAT16, CODES = torch.float32, torch.bfloat16, torch.float16, torch.uint8
#: Those that the cuda backend has kernels for. Rounding moves no bytes: of two that differ by it alone, one is here
#: unless both are compared.
FORMATS = {
    "float32": Format.uniform(FLOAT32),
    "float32-bfloat16-gradient": Format(FLOAT32, BFLOAT16, FLOAT32),
    "float32-bfloat16-state": Format(FLOAT32, FLOAT32, BFLOAT16),
    "float32-8bit": Format(FLOAT32, FLOAT32, CODES),
    "bfloat16": Format.uniform(BFLOAT16),
    "bfloat16-stochastic": Format(BFLOAT16, BFLOAT16, BFLOAT16, stochastic=True),
    "bfloat16-float32-gradient": Format(BFLOAT16, FLOAT32, BFLOAT16),
    "bfloat16-float32-state": Format(BFLOAT16, BFLOAT16, FLOAT32),
    "bfloat16-8bit": Format(BFLOAT16, BFLOAT16, CODES, stochastic=True),
    "bfloat16-master": Format(BFLOAT16, BFLOAT16, FLOAT32, master=True),
    "bfloat16-master-float32-gradient": Format(BFLOAT16, FLOAT32, FLOAT32, master=True),
    "bfloat16-master-8bit": Format(BFLOAT16, BFLOAT16, CODES, master=True),
    "float16": Format.uniform(FLOAT16),
    "float16-master": Format(FLOAT16, FLOAT16, FLOAT32, master=True),
    "float16-master-float32-gradient": Format(FLOAT16, FLOAT32, FLOAT32, master=True),
    "float64": Format.uniform(torch.float64),
}
