"""Load state without losing precision: torch.optim.Optimizer casts all state that it loads to the parameter's type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .state import stored_as_asked
from .tensors import MASTER, StateTensor, ordinary_mode


@dataclass(eq=False)
class _Kept:
    """A tensor of a state dict, which torch.optim.Optimizer.load_state_dict hands on as it is."""

    tensor: Tensor


def keep_dtypes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a state dict whose state, except for step counts, is not cast when it is loaded."""
    state = {
        index: {key: _Kept(x) if isinstance(x, Tensor) and key != "step" else x for key, x in values.items()}
        if isinstance(values, dict)
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
    wanted = {spec.key: spec for spec in specs}
    had_master = MASTER.key in state and MASTER.key not in wanted
    with ordinary_mode():
        for key, kept in state.items():
            if isinstance(kept, _Kept):
                value = kept.tensor.to(parameter.device)
                # As torch.optim.Optimizer does with what it does not know.
                if key not in wanted and value.is_floating_point() and parameter.is_floating_point():
                    value = value.to(parameter.dtype) if not _belongs_to_codes(state, key) else value
                state[key] = value
        stored_as_asked(parameter, state, specs, converts=True).apply(state)
    return had_master


def _belongs_to_codes(state: dict[str, Any], key: str) -> bool:
    codes = state.get(key.removesuffix("_scale"))
    codes = codes.tensor if isinstance(codes, _Kept) else codes
    return isinstance(codes, Tensor) and codes.dtype == torch.uint8
