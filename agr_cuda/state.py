"""The state of a parameter: what is missing of it, and how it comes to be what a backend can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .tensors import Binding, StateTensor, same_layout


@dataclass
class StateChange:
    """What a parameter's state needs before its step. Nothing has changed before `make`."""

    #: Tensors that are missing, by key.
    added: dict[str, Tensor] = field(default_factory=dict)
    #: Tensors that get other memory, and that. They stay the objects that they are, so that whoever holds one (the
    #: program that made it, another optimizer) goes on seeing its values.
    moved: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.moved)

    def make(self, state: dict[str, Any]) -> None:
        """Change `state`."""
        for tensor, memory in self.moved:
            tensor.data = memory
        state.update(self.added)


def check_whole(place: str, state: dict[str, Any], specs: Sequence[StateTensor]) -> None:
    """Raise RuntimeError if some of a parameter's state is there and some that it needs is not.

    A part made anew beside averages of a long run would be wrong for as long as they remember; if all is missing, the
    parameter begins anew.
    """
    missing = [spec.key for spec in specs if state.get(spec.key) is None and not spec.may_lack]
    found = [spec.key for spec in specs if state.get(spec.key) is not None]
    if missing and found:
        raise RuntimeError(
            f"the state of {place} has {', '.join(found)} and lacks {', '.join(missing)}; it must have all, or none to "
            "begin anew"
        )


def needed_change(binding: Binding, counts_on_device: bool) -> StateChange:
    """Return what the state of a parameter lacks: tensors, or the memory that its backend can use them in.

    Args:
        binding: the parameter.
        counts_on_device: whether its step count has to be on its device, for a graph or because a launch counts there
            (as torch.optim.AdamW's fused operation does); else it is on the CPU.

    Called within `made_for_later`.
    """
    change = StateChange()
    for spec in binding.states:
        value = binding.state.get(spec.key)
        if spec.role == "count":
            device = binding.parameter.device if counts_on_device else torch.device("cpu")
            _change_count(change, binding, spec, value, device)
        elif value is None:
            change.added[spec.key] = spec.made_for(binding.parameter, binding.parameter.device)
        elif binding.backend != "reference" and not same_layout(binding.parameter, value):
            memory = torch.empty_like(binding.parameter, dtype=value.dtype, memory_format=torch.preserve_format)
            memory.copy_(value)
            if value.is_inference():  # whose memory cannot be changed, and which nothing else updates
                change.added[spec.key] = memory
            else:
                change.moved.append((value, memory))
    return change


def _change_count(change: StateChange, binding: Binding, spec: StateTensor, value: Any, device: torch.device) -> None:
    """Add to `change` what a step count needs to be a tensor of its type on `device`."""
    dtype = spec.dtype_for(binding.parameter)
    if not isinstance(value, Tensor):  # torch's older releases saved a plain number
        made = spec.made_for(binding.parameter, device)
        change.added[spec.key] = made if value is None else made.fill_(value)
    elif value.device != device or (value.dtype != dtype and binding.backend != "reference"):
        if not is_alone(value):
            raise RuntimeError(
                f"{spec.key} of {binding.place}, in memory shared with others, is {value.dtype} on {value.device}; it "
                f"must be {dtype} on {device}"
            )
        change.moved.append((value, value.detach().to(dtype=dtype, device=device)))


def is_alone(tensor: Tensor) -> bool:
    """Whether a tensor may be given other memory: its own is not shared by processes, nor part of another tensor's."""
    shared: Any = tensor.is_shared
    if tensor.device.type == "cpu" and shared():  # of a GPU's memory it says so always
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def why_fixed(parameter: Tensor, states: dict[str, Tensor]) -> str | None:
    """Return why a kernel cannot use these states where they are, nor get them moved; or None."""
    for key, value in states.items():
        if not same_layout(parameter, value) and not is_alone(value):
            return f"its {key}, in memory shared with others, has strides {value.stride()}, not {parameter.stride()}"
    return None


def written(bindings: Sequence[Binding]) -> list[tuple[Tensor, str, str]]:
    """Return what native backends write of parameters and state that is there: tensor, key, and whose it is."""
    return [
        (value, key, binding.place)
        for binding in bindings
        if binding.backend != "reference"
        for key, value in (("", binding.parameter), *((s.key, binding.state.get(s.key)) for s in binding.states))
        if isinstance(value, Tensor)
    ]


def check_apart(tensors: Sequence[tuple[Tensor, str, str]]) -> None:
    """Raise RuntimeError if two of these tensors, all of them dense, share memory.

    Threads or blocks would update it at once: what is in it then would differ from run to run.
    """
    by_address = sorted(
        ((t.device.type, t.device.index or 0), t.data_ptr(), t.numel() * t.element_size(), i)
        for i, (t, _, _) in enumerate(tensors)
        if t.numel() > 0
    )
    for (device, begin, size, i), (other_device, other_begin, _, j) in pairwise(by_address):
        if device == other_device and other_begin < begin + size:
            one, other = (f"{key} of {place}" if key else place for _, key, place in (tensors[i], tensors[j]))
            raise RuntimeError(
                f"{one} and {other} share memory, so that an update of either would overwrite the other's; give each "
                "memory of its own, or pass only one of them"
            )
