"""The state of a parameter: what is missing of it, and how it comes to be what a backend can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .binding import Binding, same_layout


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


def check_whole(place: str, state: dict[str, Any], needed: Sequence[str], may_lack: Sequence[str]) -> None:
    """Raise RuntimeError if some of a parameter's state is there and some that is `needed` is not.

    A part made anew beside averages of a long run would be wrong for as long as they remember; if all is missing, the
    parameter begins anew.
    """
    missing = [key for key in needed if state.get(key) is None]
    found = [key for key in (*needed, *may_lack) if state.get(key) is not None]
    if missing and found:
        raise RuntimeError(
            f"the state of {place} has {', '.join(found)} and lacks {', '.join(missing)}; it must have all, or none to "
            "begin anew"
        )


def averages(binding: Binding) -> StateChange:
    """Return what the state tensors with the parameter's shape lack: themselves, or the memory layout of a kernel.

    Called within `made_for_later`.
    """
    change = StateChange()
    parameter = binding.parameter
    for key in binding.keys:
        value = binding.state.get(key)
        if value is None:
            change.added[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif binding.backend != "reference" and not same_layout(parameter, value):
            memory = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value)
            if value.is_inference():  # whose memory cannot be changed, and which nothing else updates
                change.added[key] = memory
            else:
                change.moved.append((value, memory))
    return change


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
        for key, value in (("", binding.parameter), *((k, binding.state.get(k)) for k in (*binding.keys, "step")))
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
