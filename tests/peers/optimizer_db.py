"""What PyTorch's own tests give to AdamW: options that it takes, and input that it refuses."""

from __future__ import annotations

import importlib
import sys
from typing import Any
from unittest import mock

import torch

PACKAGE = "torch.testing._internal"
# They are there for the tests of other things, take seconds, need packages that PyTorch does not bring along, and
# change settings of the whole process. Of all that, the tables of optimizers use a base class and some decorators.
LEFT_OUT = ("common_device_type", "common_methods_invocations", "common_utils")


def load() -> Any:
    """Return PyTorch's module of optimizers' inputs."""
    stand_ins = {f"{PACKAGE}.{name}": mock.MagicMock(_TestParametrizer=object) for name in LEFT_OUT}
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module(f"{PACKAGE}.common_optimizers")


_module = load()
_adamw = next(info for info in _module.optim_db if info.optim_cls is torch.optim.AdamW)


def inputs() -> dict[str, dict[str, Any]]:
    """Return the options by description: those of every kind of device, since ours are the same on all."""
    given = [each for device in ("cpu", "cuda", "mps") for each in _adamw.optim_inputs_func(device=device)]
    return {each.desc: each.kwargs for each in given}


def error_inputs() -> dict[str, Any]:
    """Return what is refused by description (and a number, where two have the same): those of every device."""
    with mock.patch.object(_module, "CUDA_CONFIG_GPUS", ["cpu"]):  # so that a GPU's are made without one
        given = _adamw.optim_error_inputs_func(device="cpu", dtype=torch.float64)
    named: dict[str, Any] = {}
    for each in given:
        name = each.optimizer_error_input.desc
        named[name if name not in named else f"{name} ({sum(key.startswith(name) for key in named) + 1})"] = each
    return named
