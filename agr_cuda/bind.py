"""Bind an optimizer's parameters to gradients, state and backends, and check everything that can be checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends
from .backends import choose, why_not
from .groups import converts_state
from .precision import Precision
from .sharding import check_distributed, keep_parts, kind_of_part, part_of, parts_of_state
from .state import (
    StateChange,
    check_codes,
    check_complete,
    check_no_overlap,
    needed_change,
    why_not_movable,
    written_tensors,
)
from .tensors import (
    Binding,
    GradientKind,
    StateTensor,
    has_memory,
    is_distributed,
    is_plain,
    is_wrapper,
    ordinary_mode,
    stored_state,
)

if TYPE_CHECKING:
    from .optimizer import AGROptimizer


def bind(optimizer: AGROptimizer, previous: Sequence[Binding]) -> list[Binding]:
    """Check every parameter that has a gradient, create its missing state, and return the bindings for a StepPlan.

    Args:
        optimizer: the optimizer whose parameters are bound.
        previous: the bindings of the previous plan. A parameter that has no gradient now keeps its previous binding if
            that is still valid, so that one plan fits whichever of its parameters have gradients.

    Raises:
        RuntimeError: for a parameter, gradient or state that cannot be used, before anything has changed.
    """
    previous_of = {id(binding.owner): binding for binding in previous}
    present, absent = [], []
    index = -1
    for group_index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            index += 1
            location = _Location(optimizer, index, group_index, position)
            if parameter.grad is not None:
                present.append(_bind(location, parameter, None))
            elif id(parameter) in previous_of:
                rebound = _bind_without_gradient(location, previous_of[id(parameter)])
                if rebound is not None:
                    absent.append(rebound)
    check_no_overlap(written_tensors(present))
    with ordinary_mode():
        changes = [state_change(optimizer, binding) for binding in present]
    # Every foreseeable error has been raised by now; only from here on is anything changed.
    for binding, change in zip(present, changes, strict=True):
        if change:
            change.apply(binding.state)
            if binding.whole is None:
                optimizer.state[binding.parameter] = binding.state
            else:
                state = optimizer.state[binding.whole]
                with ordinary_mode():
                    keep_parts(state, binding, change.added)
                for key in change.removed:
                    del state[key]
    return _merge(present, absent)


def state_change(optimizer: AGROptimizer, binding: Binding) -> StateChange:
    """Return the changes that a parameter's state needs before its step; see `needed_change`."""
    group = optimizer.param_groups[binding.group]
    on_device = bool(group["capturable"]) or binding.backend in ("cuda", "triton")
    return needed_change(binding, on_device)


class _Location:
    """The position of a parameter in an optimizer, and its name in messages."""

    def __init__(self, optimizer: AGROptimizer, index: int, group_index: int, position: int) -> None:
        self.optimizer, self.index, self.group_index = optimizer, index, group_index
        self.group = optimizer.param_groups[group_index]
        self.name = optimizer._place(group_index, position)


def _bind(location: _Location, parameter: Tensor, kind: GradientKind | None) -> Binding:
    """Return the binding of a parameter to its gradient, or to a future gradient of `kind` if it has none now."""
    precision = Precision.of(parameter, location.group)
    converts = converts_state(location.group)
    specs = stored_state(location.optimizer._declared_state(location.group), precision)
    state = location.optimizer.state.get(parameter, {})
    gradient = parameter.grad
    if precision.quantized and is_wrapper(parameter):
        raise RuntimeError(
            f"state_dtype is '8bit', and {location.name} is a {type(parameter).__name__}; the state of such tensors "
            "can be torch.float32 or torch.bfloat16"
        )
    if precision.stochastic and is_wrapper(parameter) and not is_distributed(parameter):
        raise RuntimeError(
            f"stochastic_rounding is True, and {location.name} is a {type(parameter).__name__}, whose elements have no "
            "known place in memory: stochastic_rounding=False"
        )
    whole = None
    if is_distributed(parameter):
        check_distributed(location.name, parameter, location.group)
        if gradient is not None:
            _check_gradient(location.name, parameter, gradient)
        whole, parameter = parameter, part_of(parameter)
        state = parts_of_state(location.name, whole, state, specs)
    check_tensors(location.name, parameter, state, specs)
    check_complete(location.name, state, specs)
    if kind is None:
        assert gradient is not None
        kind = GradientKind.of(parameter, gradient) if whole is None else kind_of_part(whole, parameter, gradient)
    backend = choose_backend(location, parameter, whole, kind, state, specs, precision, converts)
    if backend == "reference":
        check_writable(location.name, parameter, state)
    staged = None
    if backend != "reference" and not kind.same_layout:
        with ordinary_mode():
            staged = torch.empty_like(parameter, dtype=kind.dtype, memory_format=torch.preserve_format)
    return Binding(
        location.index, location.group_index, location.name, parameter, kind, state, specs, precision, backend,
        regularize=bool(location.group["agr"]), amsgrad=bool(location.group.get("amsgrad")), staged=staged,
        whole=whole, converts=converts, sequence=location.index + location.optimizer._origin.index,
    )  # fmt: skip


def _bind_without_gradient(location: _Location, previous: Binding) -> Binding | None:
    """Return the binding of a parameter that has no gradient now, or None if its previous binding is no longer valid.

    An unusable parameter is no error here, since this step does not update it.
    """
    try:
        binding = _bind(location, previous.owner, previous.gradient)
        with ordinary_mode():
            change = state_change(location.optimizer, binding)
    except (RuntimeError, TypeError, AttributeError):
        return None
    if change or binding.backend != previous.backend:
        return None
    return binding if all(map(has_memory, (binding.parameter, *binding.state_tensors))) else None


def _merge(present: list[Binding], absent: list[Binding]) -> list[Binding]:
    """Return all bindings in the order of their parameters.

    If a binding without a gradient shares memory with another, all bindings without gradients are left out.
    """
    together = sorted([*present, *absent], key=lambda binding: binding.index)
    if absent:
        try:
            check_no_overlap(written_tensors(together))
        except RuntimeError:
            return present
    return together


def check_tensors(place: str, parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor]) -> None:
    """Raise RuntimeError unless `parameter` can be updated and its gradient and state match it in shape and device."""
    strides = zip(parameter.shape, parameter.stride(), strict=True)
    if parameter.numel() > 0 and any(size > 1 and stride == 0 for size, stride in strides):
        raise RuntimeError(f"{place} is expanded: its elements share memory, so that they cannot be updated")
    if parameter.grad is not None:
        _check_gradient(place, parameter, parameter.grad)
    for key, spec in {key: x for x in specs for key in (x.key, x.other_key)}.items():
        value = state.get(key)
        if spec.role == "count":
            if isinstance(value, Tensor) and value.numel() != 1:
                raise RuntimeError(f"{key} of {place} has shape {tuple(value.shape)}; it must have 1 element")
        elif value is None:
            continue
        elif not isinstance(value, Tensor):
            raise RuntimeError(f"{key} of {place} is a {type(value).__name__}; it must be a tensor")
        elif value.layout != torch.strided:
            raise RuntimeError(f"{key} of {place} is {value.layout}; it must be dense (torch.strided)")
        elif value.shape != spec.shape_for(parameter):
            wanted = tuple(spec.shape_for(parameter))
            raise RuntimeError(f"{key} of {place} has shape {tuple(value.shape)}; it must be {wanted}")
        elif value.device != parameter.device:
            raise RuntimeError(f"{key} of {place} is on {value.device}; it must be on {parameter.device}")
    check_codes(place, parameter, state, specs)


def _check_gradient(place: str, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise RuntimeError(f"the gradient of {place} is {gradient.layout}; it must be dense (torch.strided)")
    if not is_wrapper(gradient) and not _has_storage(gradient):
        raise RuntimeError(
            f"the gradient of {place} belongs to a transform of torch.func, within which step() was called: a step "
            "changes tensors in place, and cannot be transformed. Give the parameters the gradients that "
            "torch.func.grad returns, and call step() then"
        )
    # A complex gradient of a real parameter would lose its imaginary part.
    if gradient.is_complex() != parameter.is_complex() or not (gradient.is_complex() or gradient.is_floating_point()):
        numbers = "complex" if parameter.is_complex() else "real floating-point numbers"
        raise RuntimeError(f"the gradient of {place} is {gradient.dtype}; it must be {numbers}")
    if gradient.shape != parameter.shape:
        shape, wanted = tuple(gradient.shape), tuple(parameter.shape)
        raise RuntimeError(f"the gradient of {place} has shape {shape}; it must be {wanted}")
    if gradient.device != parameter.device:
        raise RuntimeError(f"the gradient of {place} is on {gradient.device}; it must be on {parameter.device}")


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has memory: within transforms of torch.func, tensors stand for others and have none."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return False
    return True


def check_writable(place: str, parameter: Tensor, state: dict[str, Any]) -> None:
    """Raise RuntimeError if PyTorch forbids an in-place update of the parameter or its state.

    It does so for tensors made in torch.inference_mode(), outside of that mode. Only the reference backend, which
    updates by PyTorch's operations, is affected.
    """
    if torch.is_inference_mode_enabled():
        return
    for name, value in (("it", parameter), *((f"its {key}", value) for key, value in state.items())):
        if isinstance(value, Tensor) and value.is_inference():
            raise RuntimeError(
                f"the reference backend cannot update {place} outside of torch.inference_mode(): {name} was made within"
            )


def choose_backend(
    location: _Location,
    parameter: Tensor,
    whole: Tensor | None,
    kind: GradientKind,
    state: dict[str, Any],
    specs: Sequence[StateTensor],
    precision: Precision,
    converts: bool,
) -> str:
    """Return the backend that updates `parameter`, which is this process's part of `whole` if that is a DTensor.

    Raises:
        RuntimeError: if the requested backend does not take it, or `fused=True` rules out the only one that does.
    """
    group, requested = location.group, location.optimizer.backend
    backend = requested
    if backend is None:
        wants_reference = group["foreach"] or group.get("differentiable")
        backend = "reference" if wants_reference else choose(parameter, kind, precision)
    reason = why_not(backend, parameter, kind, precision)
    if reason is None and backend != "reference":
        reason = _why_state_unsupported(parameter, state, specs, converts)
        if reason is not None:
            backend = "reference"
    if reason is None and whole is not None and backend != "reference":
        reason = _why_part_unsupported(precision)
        if reason is not None:
            backend = "reference"
    if requested is not None and reason is not None:
        raise RuntimeError(f"backend={requested!r} does not take {location.name}: {reason}")
    # For a DTensor, fused=True is accepted with the reference backend, since FSDP2's examples have it.
    if group["fused"] and backend == "reference" and whole is None and not is_wrapper(parameter):
        others = [name for name in backends.available_backends() if name != "reference"]
        reasons = [reason] if reason else [why_not(name, parameter, kind, precision) for name in others]
        because = "; ".join(r for r in reasons if r) or "no other backend is there"
        raise RuntimeError(f"fused=True refuses the reference backend, which alone takes {location.name}: {because}")
    return backend


def _why_part_unsupported(precision: Precision) -> str | None:
    """Return why kernels do not take this process's part of a DTensor, or None if they do."""
    if precision.stochastic:
        return "stochastic rounding of a DTensor's part needs the places of its elements, which only reference knows"
    return None


def _why_state_unsupported(
    parameter: Tensor, state: dict[str, Any], specs: Sequence[StateTensor], converts: bool
) -> str | None:
    """Return why the kernels do not take a parameter with this state, or None if they do."""
    there = {s.key: (s, state[s.key]) for s in specs if s.role != "count" and state.get(s.key) is not None}
    kept = {}
    for key, (spec, value) in there.items():
        if value.dtype == spec.dtype and is_plain(value):
            if spec.role != "scales":
                kept[key] = value
        elif not is_plain(value) or not converts:
            return f"its state is a {value.dtype} {type(value).__name__}, the parameter {parameter.dtype}"
    return why_not_movable(parameter, kept)
