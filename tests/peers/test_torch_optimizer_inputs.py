"""What PyTorch's own tests give to AdamW, given to ours: the options that it takes, and the input that it refuses.

Where the two differ it is on purpose, and stands in a table here with the reason.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import adamw_input
import conftest
import optimizer_db
import pytest
import torch
from adamw_input import CASES, Case, attempt, load, then, with_options, with_parameters
from helpers import assert_like, copies, parameters, run
from torch import Tensor

import agr_cuda

INPUTS = optimizer_db.inputs()
BACKENDS = [None, *agr_cuda.available_backends()]
WIDE = [(b, d) for b in BACKENDS for d in (torch.float32, torch.float64) if d in conftest.tested_dtypes(b or "cpu")]
SHAPES = [(), (0,), (7,), (64, 33), (4097,)]
STEPS = 4
IMPLEMENTATIONS = [{"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}]


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The same as Python's numbers, and not capturable, which torch refuses on a CPU."""
    numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in options.items() if k != "capturable"}
    if "betas" in numbers:
        numbers["betas"] = tuple(float(beta) for beta in numbers["betas"])
    return numbers


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("asked", "dtype"), WIDE, ids=lambda x: str(x).removeprefix("torch."))
def test_options_that_torch_tests(name: str, asked: str | None, dtype: torch.dtype, generator) -> None:
    """With tensors among the options the result is that of the numbers in them; torch computes with float32 there."""
    options = INPUTS[name]
    params = parameters(generator, SHAPES, dtype, conftest.device_of(asked or "cpu"))
    ours = agr_cuda.AdamW(params, agr=False, backend=asked, **options)
    exact = torch.optim.AdamW(copies(params), **plain(options))
    literal = torch.optim.AdamW(copies(params), **{**options, "capturable": False})
    for optimizer in (ours, exact, literal):
        run(optimizer, STEPS)
    assert_like(ours, exact)
    assert_like(ours, literal, 1e-6)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    "how", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}], ids=str
)
def test_options_that_torch_tests_with_each_implementation(name: str, how: dict, generator) -> None:
    """torch has several implementations, and so has what stands for them here. All give the same."""
    params = [p.requires_grad_(False) for p in parameters(generator, SHAPES, torch.float64)]
    ours = agr_cuda.AdamW(params, agr=False, **INPUTS[name], **how)
    theirs = torch.optim.AdamW([p.detach() for p in copies(params)], **plain(INPUTS[name]))
    run(ours, STEPS)
    run(theirs, STEPS)
    assert_like(ours, theirs)


@dataclass(frozen=True)
class Difference:
    """What comes of a case with torch and with ours, and why."""

    theirs: str
    ours: str
    why: str
    like: Case | None = None  # which torch takes, and which has the result that ours has


def taken(theirs: str, why: str, like: Case) -> Difference:
    return Difference(theirs, "taken", why, like)


def refused(ours: str, why: str, theirs: str = "taken") -> Difference:
    return Difference(theirs, ours, why)


ONE_ERROR = "a number out of range is a ValueError that names it, wherever it stands"
EVERYWHERE = "numbers are checked in groups too, and when they change later"
NO_COMPLETION = "half a state is one error, before anything changes"
NUMBERS = "whatever is a number is taken"
TRUTH = "True and False are no numbers, and nothing else is a flag"
TENSORS = "options in tensors are read where they are needed, by each implementation"
OWN = "an option that a checkpoint lacks keeps its value"

DIFFERENCES: dict[str, Difference] = {
    # Of PyTorch's own cases.
    "a param group cannot have duplicate parameters": refused(
        "ValueError when made", "a step would update it twice", "taken, with a UserWarning"
    ),
    "lr as Tensor doesn't work with foreach & not capturable": taken(
        "ValueError when made", TENSORS, with_options(lr=0.001, foreach=True)
    ),
    "betas must be either both floats or both Tensors": taken(
        "ValueError when made", TENSORS, with_options(lr=1e-2, betas=(0.9, 0.99))
    ),
    "betas must be either both floats or both Tensors (2)": taken(
        "ValueError when made", TENSORS, with_options(lr=1e-2, betas=(0.9, 0.99))
    ),
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": taken(
        "ValueError when made", TENSORS, with_options(lr=1e-2, betas=(0.9, 0.99))
    ),
    # What torch refuses and we take.
    "betas are integers": taken("ValueError when made", NUMBERS, with_options(betas=(0.0, 0.0))),
    "betas are an integer and a float": taken("ValueError when made", NUMBERS, with_options(betas=(0.0, 0.75))),
    "betas are NumPy's": taken("ValueError when made", NUMBERS, with_options(betas=(0.5, 0.75))),
    "capturable on the CPU": taken("AssertionError at a step", "it means nothing there", with_options()),
    "differentiable and foreach": taken(
        "AssertionError at a step",
        "both ask for the reference backend",
        with_parameters(lambda: [adamw_input.leaf(2, 3).detach()]),
    ),
    "exp_avg is of another type": taken(
        "RuntimeError at a step",
        "the reference backend computes with it",
        then(lambda o: adamw_input.state(o).update(exp_avg=torch.ones(2, 3, dtype=torch.float64))),
    ),
    "step is a number": taken("RuntimeError at a step", "older checkpoints have it", then(lambda o: None)),
    "a checkpoint whose group lacks lr": taken("KeyError at a step", OWN, load(lambda checkpoint: None)),
    "a checkpoint whose group lacks betas": taken("KeyError at a step", OWN, load(lambda checkpoint: None)),
    # What we refuse and torch takes.
    "lr is True": refused("TypeError when made", TRUTH),
    "eps is True": refused("TypeError when made", TRUTH),
    "weight_decay is True": refused("TypeError when made", TRUTH),
    "amsgrad is a string": refused("TypeError when made", TRUTH),
    "maximize is a string": refused("TypeError when made", TRUTH),
    "foreach is a string": refused("TypeError when made", TRUTH),
    "fused is a string": refused("TypeError when made", TRUTH),
    "betas is a tensor": refused("ValueError when made", "two numbers are not one tensor"),
    "a group with a negative lr": refused("ValueError when made", EVERYWHERE),
    "a group with a negative eps": refused("ValueError when made", EVERYWHERE),
    "a group with a negative weight_decay": refused("ValueError when made", EVERYWHERE),
    "a later group with a negative lr": refused("ValueError at the change", EVERYWHERE),
    "lr becomes negative": refused("ValueError at a step", EVERYWHERE),
    "lr becomes NaN": refused("ValueError at a step", EVERYWHERE),
    "eps becomes negative": refused("ValueError at a step", EVERYWHERE),
    "weight_decay becomes negative": refused("ValueError at a step", EVERYWHERE),
    "a checkpoint with a negative lr": refused("ValueError at the change", EVERYWHERE),
    # What both refuse, with another error or at another time.
    "betas are one": refused("ValueError when made", ONE_ERROR, "IndexError when made"),
    "betas are three": refused("ValueError when made", ONE_ERROR, "ValueError at a step"),
    "betas are none": refused("ValueError when made", ONE_ERROR, "IndexError when made"),
    "betas is None": refused("ValueError when made", ONE_ERROR, "TypeError when made"),
    "betas is a number": refused("ValueError when made", ONE_ERROR, "TypeError when made"),
    "betas is an iterator": refused("ValueError when made", ONE_ERROR, "TypeError when made"),
    "betas are True and False": refused("TypeError when made", TRUTH, "ValueError when made"),
    "betas are tensors of two elements": refused("ValueError when made", ONE_ERROR, "RuntimeError when made"),
    "capturable is a string": refused("TypeError when made", TRUTH, "AssertionError at a step"),
    "differentiable is a string": refused("TypeError when made", TRUTH, "TypeError at a step"),
    "a group with betas out of range": refused("ValueError when made", EVERYWHERE, "RuntimeError at a step"),
    "lr becomes a tensor of two elements": refused("ValueError at a step", ONE_ERROR, "RuntimeError at a step"),
    "beta1 becomes 1": refused("ValueError at a step", ONE_ERROR, "ZeroDivisionError at a step"),
    "beta2 becomes 1.5": refused("ValueError at a step", ONE_ERROR, "RuntimeError at a step"),
    "amsgrad comes later": refused("RuntimeError at a step", NO_COMPLETION, "KeyError at a step"),
    "exp_avg vanishes": refused("RuntimeError at a step", NO_COMPLETION, "KeyError at a step"),
    "step vanishes": refused("RuntimeError at a step", NO_COMPLETION, "KeyError at a step"),
    "exp_avg is None": refused("RuntimeError at a step", NO_COMPLETION, "AttributeError at a step"),
    "exp_avg is a number": refused("RuntimeError at a step", NO_COMPLETION, "AttributeError at a step"),
    "a checkpoint that lacks exp_avg_sq": refused("RuntimeError at a step", NO_COMPLETION, "KeyError at a step"),
    "a checkpoint that lacks step": refused("RuntimeError at a step", NO_COMPLETION, "KeyError at the change"),
}


def same_parameters(mine: list[Tensor], other: list[Tensor]) -> None:
    """Where lr or betas are tensors, torch computes with them in float32."""
    for p, q in zip(mine, other, strict=True):
        if p.layout == torch.strided:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_what_is_taken_and_what_refused(name: str) -> None:
    """As torch does, but for the table; and what is taken has torch's result."""
    theirs, other = attempt(torch.optim.AdamW, CASES[name])
    ours, mine = attempt(functools.partial(agr_cuda.AdamW, agr=False), CASES[name])
    expected = DIFFERENCES.get(name, Difference(theirs, theirs, ""))
    assert (theirs, ours) == (expected.theirs, expected.ours)
    if ours == "taken":
        same_parameters(mine, attempt(torch.optim.AdamW, expected.like)[1] if expected.like is not None else other)


@pytest.mark.parametrize("name", optimizer_db.error_inputs())
def test_torch_does_what_its_tests_say(name: str) -> None:
    """So that the table is about PyTorch as it is."""
    case = optimizer_db.error_inputs()[name]
    error = case.error_type.__name__
    expected = f"taken, with a {error}" if issubclass(case.error_type, Warning) else f"{error} when made"
    assert attempt(torch.optim.AdamW, CASES[name])[0] == expected


def test_the_table_is_of_cases_that_there_are_and_that_differ() -> None:
    assert DIFFERENCES.keys() <= CASES.keys()
    assert all(each.ours != each.theirs for each in DIFFERENCES.values())
    assert all((each.like is not None) == (each.ours == "taken") for each in DIFFERENCES.values())
