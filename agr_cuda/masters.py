"""Master weights: start them from a float32 checkpoint, or from parameters that a program has written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tensors import MASTER, is_wrapper

#: What master weights are loaded from: tensors by parameters' names, a state dict of an optimizer that had master
#: weights, or one tensor for each parameter, in the order of the groups.
MasterSource = Mapping[str, Any] | Iterable[Tensor]


def master_sources(groups: Sequence[dict[str, Any]], source: MasterSource) -> list[tuple[Tensor, Tensor]]:
    """Return every parameter with the tensor that it is to be set to.

    Raises:
        KeyError: for a parameter that `source` lacks.
        ValueError: for a tensor of another shape than its parameter, and for a wrong number of tensors.
        RuntimeError: if `source` is by name and the optimizer does not know its parameters' names.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if isinstance(source, Mapping) and "state" in source and "param_groups" in source:
        found = _of_state_dict(parameters, source)
    elif isinstance(source, Mapping):
        names = [name for group in groups for name in group.get("param_names", ())]
        if len(names) != len(parameters):
            raise RuntimeError(
                "master weights are given by name, and the optimizer does not know its parameters' names: make it from "
                "model.named_parameters(), or pass a tensor for each parameter in the order of the groups"
            )
        missing = [name for name in names if name not in source]
        if missing:
            raise KeyError(f"master weights are missing for {', '.join(missing)}")
        found = [(parameter, source[name]) for name, parameter in zip(names, parameters, strict=True)]
    else:
        tensors = list(source)
        if len(tensors) != len(parameters):
            raise ValueError(f"{len(tensors)} master weights are given, and there are {len(parameters)} parameters")
        found = list(zip(parameters, tensors, strict=True))
    for i, (parameter, tensor) in enumerate(found):
        if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"master weight {i} is {what}; it must be a tensor of shape {tuple(parameter.shape)}")
        if is_wrapper(tensor) != is_wrapper(parameter):
            kinds = type(tensor.detach()).__name__, type(parameter.detach()).__name__
            raise ValueError(
                f"master weight {i} is a {kinds[0]}, and its parameter a {kinds[1]}; both must be of one kind"
            )
    return found


def _of_state_dict(parameters: list[Tensor], saved: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        raise ValueError(f"the state dict has {len(indices)} parameters, and there are {len(parameters)} here")
    states = [saved["state"].get(index, {}) for index in indices]
    found = [(p, s[MASTER.key]) for p, s in zip(parameters, states, strict=True) if MASTER.key in s]
    if not found:
        raise KeyError(f"the state dict has no {MASTER.key}")
    return found


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor, state: dict[str, Any] | None) -> None:
    """Set a parameter to `value`, and also its master, which is in `state`; without one, `state` is None."""
    if state is not None:
        if not isinstance(state.get(MASTER.key), Tensor):
            state[MASTER.key] = MASTER.create(parameter, parameter.device)
        value = state[MASTER.key].copy_(value)
    parameter.copy_(value)
