"""Binds an optimizer's parameters to gradients, state and backends; what can be checked is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends
from .backends import choose, why_not
from .state import StateChange, check_apart, check_whole, needed_change, why_fixed, written
from .tensors import Binding, GradientKind, StateTensor, is_plain, is_wrapper, made_for_later

if TYPE_CHECKING:
    from .optimizer import AGROptimizer


def bind(optimizer: AGROptimizer, before: Sequence[Binding]) -> list[Binding]:
    """Check every parameter that has a gradient, make the state that is missing, and return what a step is planned of.

    Args:
        optimizer: whose parameters.
        before: bindings of an earlier plan. A parameter that has no gradient now stays bound as it was if it still
            could be, so that the plan fits whichever of its parameters have gradients.

    Raises:
        RuntimeError: for what a step cannot be made of, before anything has changed.
    """
    missing = {id(binding.parameter): binding for binding in before}
    present, absent = [], []
    index = -1
    for group_index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            index += 1
            at = _Place(optimizer, index, group_index, position)
            if parameter.grad is not None:
                present.append(_bound(at, parameter, None))
            elif id(parameter) in missing and (again := _bound_again(at, missing[id(parameter)])) is not None:
                absent.append(again)
    check_apart(written(present))
    with made_for_later():
        changes = [state_change(optimizer, binding) for binding in present]
    # From here on nothing fails that could have been foreseen.
    for binding, change in zip(present, changes, strict=True):
        if change:
            change.make(binding.state)
            optimizer.state[binding.parameter] = binding.state
    return _together(present, absent)


def state_change(optimizer: AGROptimizer, binding: Binding) -> StateChange:
    """Return what a parameter's state needs before its step; see needed_change."""
    capturable = bool(optimizer.param_groups[binding.group]["capturable"])
    return needed_change(binding, capturable or binding.backend in ("cuda", "triton"))


class _Place:
    """Where a parameter is in an optimizer."""

    def __init__(self, optimizer: AGROptimizer, index: int, group_index: int, position: int) -> None:
        self.optimizer, self.index, self.group_index = optimizer, index, group_index
        self.group = optimizer.param_groups[group_index]
        self.name = f"group {group_index}, parameter {position}"
        names = self.group.get("param_names", ())
        if position < len(names):
            self.name += f" ({names[position]!r})"


def _bound(at: _Place, parameter: Tensor, kind: GradientKind | None) -> Binding:
    """Return the binding of a parameter to its gradient or, if it has none now, to such as `kind` says."""
    specs = at.optimizer._states(at.group)
    state = at.optimizer.state.get(parameter, {})
    check_tensors(at.name, parameter, state, specs)
    check_whole(at.name, state, specs)
    if kind is None:
        gradient = parameter.grad
        assert gradient is not None
        kind = GradientKind.of(parameter, gradient)
    backend = choose_backend(at, parameter, kind, state, specs)
    if backend == "reference":
        check_changeable(at.name, parameter, state)
    staged = None
    if backend != "reference" and not kind.same_layout:
        with made_for_later():
            staged = torch.empty_like(parameter, dtype=kind.dtype, memory_format=torch.preserve_format)
    return Binding(
        at.index, at.group_index, at.name, parameter, kind, state, specs, backend,
        regularize=bool(at.group["agr"]), amsgrad=bool(at.group.get("amsgrad")), staged=staged,
    )  # fmt: skip


def _bound_again(at: _Place, before: Binding) -> Binding | None:
    """Return the binding of a parameter that has no gradient now; None if it is not as it was, so that it has to wait.

    Nothing is wrong with a parameter that cannot be updated while it is not.
    """
    try:
        binding = _bound(at, before.parameter, before.gradient)
        with made_for_later():
            change = state_change(at.optimizer, binding)
    except RuntimeError:
        return None
    return None if change or binding.backend != before.backend else binding


def _together(present: list[Binding], absent: list[Binding]) -> list[Binding]:
    """Return all bindings in the order of their parameters, without the absent if some shares memory with another."""
    together = sorted([*present, *absent], key=lambda binding: binding.index)
    if absent:
        try:
            check_apart(written(together))
        except RuntimeError:
            return present
    return together


def check_tensors(place: str, parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]) -> None:
    """Raise RuntimeError unless `parameter` can be updated, and its gradient and state fit it. Changes nothing."""
    strides = zip(parameter.shape, parameter.stride(), strict=True)
    if parameter.numel() > 0 and any(size > 1 and stride == 0 for size, stride in strides):
        raise RuntimeError(f"{place} is expanded: its elements share memory, so that they cannot be updated")
    if parameter.grad is not None:
        _check_gradient(place, parameter, parameter.grad)
    wanted = tuple(parameter.shape)
    for spec in specs:
        key, value = spec.key, state.get(spec.key)
        if spec.role == "count":
            if isinstance(value, Tensor) and value.numel() != 1:
                raise RuntimeError(f"{key} of {place} has shape {tuple(value.shape)}; it must have 1 element")
        elif value is None:
            continue
        elif not isinstance(value, Tensor):
            raise RuntimeError(f"{key} of {place} is a {type(value).__name__}; it must be a tensor")
        elif value.shape != parameter.shape:
            raise RuntimeError(f"{key} of {place} has shape {tuple(value.shape)}; it must be {wanted}")
        elif value.device != parameter.device:
            raise RuntimeError(f"{key} of {place} is on {value.device}; it must be on {parameter.device}")


def _check_gradient(place: str, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise RuntimeError(f"the gradient of {place} is {gradient.layout}; it must be dense (torch.strided)")
    if gradient.shape != parameter.shape:
        shape, wanted = tuple(gradient.shape), tuple(parameter.shape)
        raise RuntimeError(f"the gradient of {place} has shape {shape}; it must be {wanted}")
    if gradient.device != parameter.device:
        raise RuntimeError(f"the gradient of {place} is on {gradient.device}; it must be on {parameter.device}")


def check_changeable(place: str, parameter: Tensor, state: dict[str, Any]) -> None:
    """Raise RuntimeError if PyTorch would not let the reference backend change one of these in place."""
    if torch.is_inference_mode_enabled():
        return
    for name, value in (("it", parameter), *((f"its {key}", value) for key, value in state.items())):
        if isinstance(value, Tensor) and value.is_inference():
            raise RuntimeError(
                f"the reference backend cannot update {place} outside of torch.inference_mode(): {name} was made within"
            )


def choose_backend(
    at: _Place, parameter: Tensor, kind: GradientKind, state: dict[str, Any], specs: Sequence[StateTensor]
) -> str:
    """Return the backend that updates `parameter`, or raise RuntimeError if the program refuses that one."""
    group, asked = at.group, at.optimizer.backend
    backend = asked
    if backend is None:
        wants_reference = group["foreach"] or group.get("differentiable")
        backend = "reference" if wants_reference else choose(parameter, kind)
    reason = why_not(backend, parameter, kind)
    if reason is None and backend != "reference":
        reason = _why_not_with(parameter, state, specs)
        if reason is not None:
            backend = "reference"
    if asked is not None and reason is not None:
        raise RuntimeError(f"backend={asked!r} does not take {at.name}: {reason}")
    # What fused=True asks for, of a DTensor, is a step: nothing else takes it.
    if group["fused"] and backend == "reference" and not is_wrapper(parameter):
        others = [name for name in backends.available_backends() if name != "reference"]
        reasons = [reason] if reason else [why_not(name, parameter, kind) for name in others]
        because = "; ".join(r for r in reasons if r) or "no other backend is there"
        raise RuntimeError(f"fused=True refuses the reference backend, which alone takes {at.name}: {because}")
    return backend


def _why_not_with(parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]) -> str | None:
    """Return why native kernels do not take a parameter with this state, or None."""
    there = {s.key: (s, state[s.key]) for s in specs if s.role == "average" and state.get(s.key) is not None}
    for spec, value in there.values():
        if value.dtype != spec.dtype_for(parameter) or not is_plain(value):
            return f"its state is a {value.dtype} {type(value).__name__}, the parameter {parameter.dtype}"
    return why_fixed(parameter, {key: value for key, (_, value) in there.items()})
