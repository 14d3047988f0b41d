"""The optimizer state of a parameter: check it, create what is missing, and give it the layout its backend needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .quantization import dequantize, quantize, scale_count
from .tensors import MASTER, Binding, StateTensor, is_wrapper, same_layout


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

    def update(self, other: StateChange) -> None:
        """Take the changes of another tensor of the same state along."""
        self.added.update(other.added)
        self.moved += other.moved
        self.removed += other.removed

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

    def there(spec: StateTensor) -> bool:
        return state.get(spec.key) is not None or state.get(spec.other_key) is not None

    missing = [spec.key for spec in specs if not there(spec) and not spec.optional]
    found = [spec.key for spec in specs if there(spec) and spec.role != "master"]
    if missing and found:
        raise RuntimeError(
            f"the state of {place} has {', '.join(found)} and lacks {', '.join(missing)}; it must have all, or none to "
            "begin anew"
        )


def check_codes(place: str, parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]) -> None:
    """Raise RuntimeError if an average's codes are no codes of 8 bits, or their scales not those of the parameter."""
    for spec in specs:
        codes = state.get(spec.codes_key)
        if spec.role != "average" or codes is None or (spec.key != spec.codes_key and state.get(spec.key) is not None):
            continue
        if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
            found = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise RuntimeError(f"{spec.codes_key} of {place} is {found}; it must be a tensor of torch.uint8")
        if not _has_scales(parameter, state, spec):
            scales, wanted = state.get(spec.scales_key), scale_count(parameter.numel())
            found = f"of shape {tuple(scales.shape)}" if isinstance(scales, Tensor) else "missing"
            raise RuntimeError(
                f"{spec.codes_key} of {place} are codes of 8 bits, and {spec.scales_key} is {found}; it must have "
                f"{wanted} elements"
            )


def _has_scales(parameter: Tensor, state: dict[str, Any], spec: StateTensor) -> bool:
    scales = state.get(spec.scales_key)
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

    Codes of 8 bits become numbers, and the other way round. Numbers of one type become numbers of another if
    `converts`. What is missing stays missing, what another precision has left is removed, and what does not fit the
    parameter is left for the checks before a step to refuse.
    """
    change = StateChange()
    for spec in specs:
        if spec.role == "average":
            change.update(_stored_average(parameter, state, spec, converts))
        elif spec.role == "master" and isinstance(state.get(spec.key), Tensor):
            change.update(_stored_numbers(parameter, state, spec, converts))
    if MASTER.key in state and MASTER not in specs:
        change.removed.append(MASTER.key)
    return change


def _stored_average(parameter: Tensor, state: dict[str, Any], spec: StateTensor, converts: bool) -> StateChange:
    """Return the changes by which an average is stored as `spec` says."""
    other = state.get(spec.other_key)
    change = StateChange()
    if isinstance(state.get(spec.key), Tensor):
        change = _stored_numbers(parameter, state, spec, converts)
    elif not isinstance(other, Tensor) or other.shape != parameter.shape:
        return change
    elif spec.dtype == torch.uint8:
        if is_wrapper(parameter):
            return change
        change.added.update(quantized_like(parameter, other, spec))
    elif _has_scales(parameter, state, spec):
        # Blocks are of neighbours in this order.
        numbers = dequantize(other.contiguous(), state[spec.scales_key], spec.signed)
        change.added[spec.key] = _converted(parameter, numbers, spec.dtype)
    else:
        return change
    # What the other way has left.
    leftover = [spec.other_key] if spec.dtype == torch.uint8 else [spec.other_key, spec.scales_key]
    change.removed += [key for key in leftover if key in state]
    return change


def _stored_numbers(parameter: Tensor, state: dict[str, Any], spec: StateTensor, converts: bool) -> StateChange:
    """Return the changes by which a master, or an average that is stored the right way, has the right type."""
    value, change = state[spec.key], StateChange()
    if value.shape == parameter.shape:
        if spec.dtype == torch.uint8:
            if not value.is_contiguous():
                change.added[spec.key] = value.contiguous()
        elif converts and value.dtype != spec.dtype:
            change.added[spec.key] = _converted(parameter, value.detach(), spec.dtype)
    return change


def _converted(parameter: Tensor, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return state in another dtype, in the memory layout of its parameter unless either is a wrapper."""
    if is_wrapper(parameter) or is_wrapper(values):
        return values.to(dtype)
    return torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format).copy_(values)


def quantized_like(parameter: Tensor, values: Tensor, spec: StateTensor) -> dict[str, Tensor]:
    """Return the codes and scales of an average, by their keys. The parameter is contiguous, and so are the codes."""
    like_parameter = torch.empty_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
    codes, scales = quantize(like_parameter.copy_(values), spec.signed)
    return {spec.codes_key: codes, spec.scales_key: scales}


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
