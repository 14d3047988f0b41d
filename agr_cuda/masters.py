"""Master weights: start them from a float32 checkpoint, or from parameters that a program has written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .precision import SIXTEEN_BITS
from .tensors import MASTER, StateTensor, is_wrapper

#: What master weights are loaded from: tensors by parameters' names, a state dict of an optimizer that had master
#: weights, or one tensor for each parameter, in the order of the groups.
MasterSource = Mapping[str, Any] | Iterable[Tensor]


def master_sources(groups: Sequence[dict[str, Any]], source: MasterSource) -> list[tuple[Tensor, Tensor]]:
    """Return every parameter with the tensor that it is to be set to.

    Raises:
        KeyError: for a parameter that `source` lacks.
        ValueError: for a tensor of another shape than its parameter, for one that is sparse, on the meta device, or not
            of real floating-point numbers, and for a wrong number of tensors.
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
        if isinstance(tensor, Tensor) and (
            tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point()
        ):
            kind = "a meta tensor" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise ValueError(f"master weight {i} is {kind}; it must be a dense tensor of real floating-point numbers")
        if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"master weight {i} is {what}; it must be a tensor of shape {tuple(parameter.shape)}")
        if is_wrapper(tensor) != is_wrapper(parameter):
            kinds = type(tensor.detach()).__name__, type(parameter.detach()).__name__
            raise ValueError(
                f"master weight {i} is a {kinds[0]}, and its parameter a {kinds[1]}; both must be of one kind"
            )
    return found


def is_outdated_master(master: Any) -> bool:
    """Whether a loaded master comes from an optimizer without masters, which has cast it, and moved the parameter."""
    return isinstance(master, Tensor) and master.dtype in SIXTEEN_BITS


def _of_state_dict(parameters: list[Tensor], saved: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        raise ValueError(f"the state dict has {len(indices)} parameters, and there are {len(parameters)} here")
    states = [saved["state"].get(index, {}) for index in indices]
    masters = [(p, s[MASTER.key]) for p, s in zip(parameters, states, strict=True) if MASTER.key in s]
    found = [(p, master) for p, master in masters if not is_outdated_master(master)]
    if masters and not found:
        raise KeyError(
            f"the state dict's {MASTER.key} is of 16 bits: an optimizer without master weights has carried it "
            "along, and moved the parameters since"
        )
    if not found:
        raise KeyError(f"the state dict has no {MASTER.key}")
    return found


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]) -> None:
    """Set a parameter to `value`, and its master too, if it has one among its state tensors, which are `specs`."""
    if MASTER in specs:
        if not state:
            # A checkpoint with nothing but masters is not one that other optimizers could go on from.
            for spec in specs:
                where = torch.device("cpu") if spec.role == "count" else parameter.device
                state[spec.key] = spec.create(parameter, where)
        elif not isinstance(state.get(MASTER.key), Tensor):
            state[MASTER.key] = MASTER.create(parameter, parameter.device)
        value = state[MASTER.key].copy_(value)
    parameter.copy_(value)
