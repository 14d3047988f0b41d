"""Checkpoints that lose no precision: torch.optim.Optimizer casts all state that it loads to the parameter's type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .masters import is_outdated_master
from .state import stored_as_asked
from .tensors import MASTER, StateTensor, ordinary_mode


@dataclass(eq=False)
class _Kept:
    """A tensor of a state dict, which torch.optim.Optimizer.load_state_dict hands on as it is."""

    tensor: Tensor


def keep_dtypes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a state dict whose state, except for step counts, is not cast when it is loaded."""
    indices = {index for group in state_dict["param_groups"] for index in group["params"]}
    state = {
        index: {key: _Kept(x) if isinstance(x, Tensor) and key != "step" else x for key, x in values.items()}
        if index in indices and isinstance(values, dict)
        else values
        for index, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def take_loaded(parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]) -> bool:
    """Give the state that was loaded for a parameter the device and the types that it is to have, in place.

    Args:
        parameter: the parameter.
        state: its state, of which some are tensors that `keep_dtypes` kept from being cast.
        specs: its state tensors.

    Returns:
        Whether there was a master copy that the parameter does not have.
    """
    wanted = {spec.key for spec in specs}
    stays = wanted | {key for spec in specs if spec.role == "average" for key in (spec.other_key, spec.scales_key)}
    tensors = {key: _usable(kept.tensor, parameter.device) for key, kept in state.items() if isinstance(kept, _Kept)}
    if isinstance(state.get("step"), Tensor):
        state["step"] = _usable(state["step"], state["step"].device)
    if MASTER.key in tensors and is_outdated_master(tensors[MASTER.key]):
        del tensors[MASTER.key], state[MASTER.key]
    for key, value in tensors.items():
        # torch.optim.Optimizer casts all that it does not know.
        state[key] = value.to(parameter.dtype) if key not in stays and parameter.is_floating_point() else value
    had_master = MASTER.key in state and MASTER.key not in wanted
    with ordinary_mode():
        stored_as_asked(parameter, state, specs, converts=parameter.is_floating_point()).apply(state)
    return had_master


def _usable(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a loaded tensor on a device. Later steps change it in place, in inference mode or not."""
    with ordinary_mode():
        moved = tensor.to(device)
        return moved.clone() if moved.is_inference() else moved
