"""What builds a contender: a function from parameters to a step, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch

Parameters = list[torch.nn.Parameter]
Step = Callable[[], object]
Builder = Callable[[Parameters, float], Step]  # parameters, eps -> the step

Unmeasured = Literal["not installed", "not available", "failed"]

LEARNING_RATE = 1e-6  # so small that the parameters stay finite whatever the number of rounds
WEIGHT_DECAY = 1e-2
EPS = {torch.float16: 1e-4}  # 1e-8 is zero in float16, and plain foreach operations would divide by it
DEFAULT_EPS = 1e-8
PIP_NAMES = {"agr_cuda": "agr-cuda", "optimi": "torch-optimi"}  # where a package is called otherwise than its module


class LeftOutError(Exception):
    """A contender cannot run here, by no fault of its own; the message says why, or what it needs."""

    status: Unmeasured = "not available"


class NotInstalledError(LeftOutError):
    """Its package is not there, or one that this needs; the message names it as pip does."""

    status: Unmeasured = "not installed"


def why_unmeasured(error: Exception) -> tuple[Unmeasured, str]:
    """Return status and reason of a contender that raised this."""
    if isinstance(error, LeftOutError):
        return error.status, str(error)
    return "failed", f"{type(error).__name__}: {error}"


def eps_for(dtype: torch.dtype) -> float:
    """Return the eps that optimizers of parameters of this type are given."""
    return EPS.get(dtype, DEFAULT_EPS)


def imported(module: str) -> ModuleType:
    """Return a module. Raises LeftOutError where it, or what it imports, is not installed or cannot be imported."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package, missing = (name.partition(".")[0] for name in (module, error.name or module))
        needed_by = "" if missing == package else f", which {package} needs"
        raise NotInstalledError(f"not installed: pip install {PIP_NAMES.get(missing, missing)}{needed_by}") from error
    except Exception as error:  # whatever a package made for another machine or another PyTorch raises
        raise LeftOutError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error


def optimizer(module: str, name: str, **options: Any) -> Builder:
    """Return a builder for one of the module's optimizers with these options."""

    def make(parameters: Parameters, eps: float) -> Step:
        made = getattr(imported(module), name)
        step: Step = made(parameters, lr=LEARNING_RATE, eps=eps, weight_decay=WEIGHT_DECAY, **options).step
        return step

    return make
