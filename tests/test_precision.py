"""State of other types, master weights, codes of 8 bits and stochastic rounding, on every backend that takes them.

Each step starts from what is stored, and is compared with the float64 oracle's step from the same numbers, stored in the
same way: what a backend stores must be what a number is stored as that float32 arithmetic may have found; see
tests/stored.py. So the bits of nearly all elements are known, of those rounded at random too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import stored
import torch
from conftest import case_id, device_of, interpreted_by_python
from helpers import (
    STEPS,
    all_params,
    assert_parameters_close,
    assert_same_bits,
    relative_error,
    same_bits,
    snapshot,
)
from precisions import (
    CASES,
    DTYPES,
    LARGE,
    RULES,
    SMALL,
    TAKEN,
    UNSIGNED,
    Case,
    exact,
    fill_gradients,
    flat,
    leaf,
    made,
    on_cases,
    problem,
    step_beside_oracle,
)
from torch import Tensor

import agr_cuda
from agr_cuda.quantization import code_values, dequantize, quantize
from agr_cuda.rounding import random_bits, round_stochastically

# Beside the oracle.


def both(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Half of the parameters with AGR, the others without."""
    middle = len(params) // 2
    return [{"params": params[:middle]}, {"params": params[middle:], "agr": False}]


def follow(on: str, rule: str, case: Case, params: Any, generator: torch.Generator, steps: int, **options: Any) -> None:
    optimizer = made(on, rule, case, params, **options)
    for _ in range(1 if interpreted_by_python(on) and steps == 1 else min(steps, 3) if interpreted_by_python(on) else steps):
        fill_gradients(all_params(optimizer), generator)
        step_beside_oracle(rule, case, optimizer)


@pytest.mark.parametrize(("on", "rule", "case"), on_cases(every=4), ids=case_id)
def test_every_way_to_store_numbers(on: str, rule: str, case: Case, generator) -> None:
    params = problem(on, case, generator, [(LARGE,), (SMALL,), (LARGE,), (SMALL,)])
    follow(on, rule, case, both(params), generator, STEPS, rounding_seed=2**40 + 7)
