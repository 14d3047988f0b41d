"""The optimizer state of a parameter: check it, create what is missing, and give it the layout its backend needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .quantization import dequantize, quantize, scale_count
from .tensors import MASTER, Binding, StateTensor, is_dense, is_wrapper, same_layout, scales_key, state_like


@dataclass
class StateChange:
    """The changes that a parameter's state needs before its step. Nothing changes until `apply` is called."""

    #: New tensors for the missing state, by key.
    added: dict[str, Tensor] = field(default_factory=dict)
    #: Existing tensors, each with the new memory that it gets. The tensor object stays the same, so that other holders
    #: of it (the program that made it, another optimizer) still see its values.
    moved: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    #: The keys of what another precision has left, and nothing updates any more.
    removed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.moved or self.removed)

    def apply(self, state: dict[str, Any]) -> None:
        """Apply the changes to `state`, the parameter's state dictionary."""
        for tensor, memory in self.moved:
            tensor.data = memory
        state.update(self.added)
        for key in self.removed:
            del state[key]


def check_complete(place: str, state: dict[str, Any], specs: Sequence[StateTensor]) -> None:
    """Raise RuntimeError if a parameter has part of its required state but not all of it.

    A newly initialized tensor beside averages from a long run would bias the steps for as long as those averages
    remember. If all state is missing, the parameter starts from its first step.
    """
    missing = [spec.key for spec in specs if state.get(spec.key) is None and not spec.optional]
    found = [spec.key for spec in specs if state.get(spec.key) is not None and spec.role != "master"]
    if missing and found:
        raise RuntimeError(
            f"the state of {place} has {', '.join(found)} and lacks {', '.join(missing)}; it must have all, or none to "
            "begin anew"
        )


def check_codes(place: str, parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]) -> None:
    """Raise RuntimeError if an average is stored as codes of 8 bits, and its scales are not those of the parameter."""
    for spec in specs:
        value = state.get(spec.key)
        if spec.role == "average" and _is_coded(value) and not _has_scales(parameter, state, spec.key):
            key, wanted = scales_key(spec.key), scale_count(parameter.numel())
            scales = state.get(key)
            found = f"of shape {tuple(scales.shape)}" if isinstance(scales, Tensor) else "missing"
            raise RuntimeError(
                f"{spec.key} of {place} has codes of 8 bits, and {key} is {found}; it must have {wanted} elements"
            )


def _is_coded(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def _has_scales(parameter: Tensor, state: dict[str, Any], key: str) -> bool:
    scales = state.get(scales_key(key))
    return isinstance(scales, Tensor) and scales.shape == (scale_count(parameter.numel()),)


def needed_change(binding: Binding, counts_on_device: bool) -> StateChange:
    """Return the changes that a parameter's state needs: missing tensors, and memory that its backend can use.

    Args:
        binding: the parameter with its state.
        counts_on_device: whether its step count must be on its device, because a graph may be captured or because the
            launch increments it there (as torch.optim.AdamW's fused operation does). Otherwise the count is on the CPU.

    Call it within `ordinary_mode`.
    """
    change = stored_as_asked(binding.parameter, binding.state, binding.specs, binding.converts)
    for spec in binding.specs:
        value = binding.state.get(spec.key)
        if spec.role == "count":
            device = binding.parameter.device if counts_on_device else torch.device("cpu")
            _change_count(change, binding, spec, value, device)
        elif spec.key in change.added:
            continue
        elif value is None or (spec.role == "scales" and spec.codes_key in change.added):
            change.added[spec.key] = spec.create(binding.parameter, binding.parameter.device)
        elif spec.role == "scales":
            if value.dtype != spec.dtype or not value.is_contiguous():
                change.added[spec.key] = value.to(spec.dtype).contiguous()
        elif binding.backend != "reference" and not same_layout(binding.parameter, value):
            memory = torch.empty_like(binding.parameter, dtype=value.dtype, memory_format=torch.preserve_format)
            memory.copy_(value)
            # The memory of an inference tensor cannot be replaced, so the tensor is; no other code updates it.
            if value.is_inference():
                change.added[spec.key] = memory
            else:
                change.moved.append((value, memory))
    return change


def stored_as_asked(
    parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor], converts: bool
) -> StateChange:
    """Return the changes by which a parameter's averages and master are stored as `specs` say.

    Codes of 8 bits become numbers, and the other way round; where codes are in another memory layout than the
    parameter, and so in other blocks, they are made anew. Numbers of one type become numbers of another if `converts`.
    What is missing stays missing, what another precision has left is removed, and what does not fit the parameter is
    left for the checks before a step to refuse.
    """
    change = StateChange()
    wanted = {spec.key: spec for spec in specs}
    for spec in specs:
        value, its_scales = state.get(spec.key), scales_key(spec.key)
        if spec.role in ("count", "scales") or not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        to_codes, coded = spec.dtype == torch.uint8, _is_coded(value)
        if (to_codes and is_wrapper(parameter)) or (coded and not _has_scales(parameter, state, spec.key)):
            continue
        if coded and not (to_codes and same_layout(state_like(parameter), value)):
            dense = value if is_dense(value) else value.clone()
            value = dequantize(dense, state[its_scales], spec.signed)
        if to_codes and not _is_coded(value):
            change.added.update(quantized_like(parameter, value, spec))
        elif not to_codes and (coded or (converts and value.dtype != spec.dtype)):
            change.added[spec.key] = _converted(parameter, value.detach(), spec.dtype)
        if spec.role == "average" and its_scales in state and its_scales not in wanted:
            change.removed.append(its_scales)
    if MASTER.key in state and MASTER.key not in wanted:
        change.removed.append(MASTER.key)
    return change


def _converted(parameter: Tensor, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return state in another dtype, in the memory layout of its parameter unless either is a wrapper."""
    if is_wrapper(parameter) or is_wrapper(values):
        return values.to(dtype)
    return torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format).copy_(values)


def quantized_like(parameter: Tensor, values: Tensor, spec: StateTensor) -> dict[str, Tensor]:
    """Return the codes and scales of an average, by their keys, in the memory layout of its parameter."""
    like_parameter = torch.empty_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
    codes, scales = quantize(like_parameter.copy_(values), spec.signed)
    return {spec.key: codes, scales_key(spec.key): scales}


def _change_count(change: StateChange, binding: Binding, spec: StateTensor, value: Any, device: torch.device) -> None:
    """Add to `change` what makes a step count a tensor of the declared dtype on `device`."""
    dtype = spec.dtype
    assert dtype is not None
    if not isinstance(value, Tensor):  # older releases of PyTorch saved a plain number
        made = spec.create(binding.parameter, device)
        change.added[spec.key] = made if value is None else made.fill_(value)
    elif value.device != device or (value.dtype != dtype and binding.backend != "reference"):
        if not owns_storage(value):
            raise RuntimeError(
                f"{spec.key} of {binding.place}, in memory shared with others, is {value.dtype} on {value.device}; it "
                f"must be {dtype} on {device}"
            )
        change.moved.append((value, value.detach().to(dtype=dtype, device=device)))


def owns_storage(tensor: Tensor) -> bool:
    """Whether a tensor is the only user of its memory, so that its memory may be replaced.

    Memory that is shared between processes, and a view into a larger storage, must stay where they are.
    """
    shared: Any = tensor.is_shared
    if tensor.device.type == "cpu" and shared():  # For a GPU's memory, is_shared() is always True.
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def why_not_movable(parameter: Tensor, states: dict[str, Tensor]) -> str | None:
    """Return why kernels can neither use these state tensors in place nor have them moved; or None if they can.

    Args:
        parameter: the parameter, whose memory layout the kernels require.
        states: its state tensors, by key.
    """
    for key, value in states.items():
        if not same_layout(parameter, value) and not owns_storage(value):
            return f"its {key}, in memory shared with others, has strides {value.stride()}, not {parameter.stride()}"
    return None


def written_tensors(bindings: Sequence[Binding]) -> list[tuple[Tensor, str, str]]:
    """Return the existing tensors that the native backends write, each as (tensor, state key, parameter's name).

    The state key of a parameter itself is empty.
    """
    return [
        (value, key, binding.place)
        for binding in bindings
        if binding.backend != "reference"
        for key, value in (("", binding.parameter), *((s.key, binding.state.get(s.key)) for s in binding.specs))
        if isinstance(value, Tensor)
    ]


def check_no_overlap(tensors: Sequence[tuple[Tensor, str, str]]) -> None:
    """Raise RuntimeError if any two of these dense tensors share memory.

    Several threads or blocks would update that memory at the same time, and the result would differ from run to run.
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
