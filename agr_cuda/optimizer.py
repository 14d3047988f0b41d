"""What AdamW and Adan share: options, checks, state, and the schedule that a step reuses until something moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import backends
from .backends import check_backend, choose, why_not
from .binding import Binding, is_plain, same_layout
from .cpu import CpuLaunch
from .reference import ReferenceLaunch

# Options that are numbers or flags of a group; which kernels run, and on which state, depends on these.
_STRUCTURE = ("agr", "foreach", "fused", "capturable")


class Schedule:
    """What steps need that stays the same until something moves: the launches, and the watch that notices."""

    def __init__(self, structure: list[Any], bindings: list[Binding]) -> None:
        self.structure = structure
        self.bindings = bindings
        self.launches: list[CpuLaunch | ReferenceLaunch] = []
        self.relaid = [b for b in bindings if b.relaid is not None]
        # Parameters that are written without PyTorch's knowledge.
        self.written = [b.parameter for b in bindings if b.backend != "reference"]
        self.watch: Any = None

    @property
    def backends(self) -> list[str]:
        """The names of the backends used."""
        return sorted({launch.backend for launch in self.launches})


def nonnegative(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is at least 0 (NaN is not)."""
    if not value >= 0.0:
        raise ValueError(f"{name} is {_shown(value)}; it must be at least 0")


def fractions(name: str, values: Any, count: int) -> None:
    """Raise ValueError unless `values` are `count` numbers in [0, 1)."""
    if len(values) != count:
        raise ValueError(f"{name} is {_shown(values)}; it must be {count} numbers")
    for i, value in enumerate(values):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}[{i}] is {_shown(value)}; it must be at least 0 and less than 1")


def _shown(value: Any) -> str:
    return str(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)


class AGROptimizer(torch.optim.Optimizer):
    """The base of `agr_cuda.AdamW` and `agr_cuda.Adan`."""

    #: The update rule's name in the native core.
    _rule: str
    #: The group options that select a rule's variant.
    _variant: tuple[str, ...] = ()

    _schedule: Schedule | None
    _checked: list[tuple[float, ...]] | None  # the numbers that were last found in range
    _fresh: set[Tensor]  # parameters whose state is made, and no step yet made with it
    _warned: bool  # of tensors of one element

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], max_grad_norm: float | None, backend: str | None
    ) -> None:
        if max_grad_norm is not None:
            nonnegative("max_grad_norm", max_grad_norm)
        check_backend(backend)
        #: Clip by this global norm; None or 0 does not clip. One number for all groups.
        self.max_grad_norm = max_grad_norm
        #: The backend asked for, or None to choose for each parameter.
        self.backend = backend
        self._forget()
        super().__init__(params, defaults)

    # What a rule says of itself.

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the keys of the state tensors that have the parameter's shape, in the order of the rule."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Return the group's numbers in the order in which the native core takes them."""
        raise NotImplementedError

    def _check_numbers(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a number out of range."""
        raise NotImplementedError

    # torch.optim.Optimizer's interface.

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            for name in ("max_grad_norm", "backend"):
                if name in param_group:
                    raise ValueError(
                        f"{name} is {param_group[name]!r} in a parameter group; it is one setting for the whole "
                        f"optimizer, given as {type(self).__name__}(..., {name}=...)"
                    )
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._schedule = None

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_numbers(group)
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(group['lr'].shape)}; it must have 1 element")
        if group["fused"] and group["foreach"]:
            raise RuntimeError("fused=True and foreach=True: only one of them can be asked for")
        if group["fused"] and group.get("differentiable"):
            raise RuntimeError("fused=True and differentiable=True: only the reference backend is differentiable")
        if group["fused"] and self.backend == "reference":
            raise RuntimeError("fused=True refuses the reference backend, and backend='reference' asks for it")
        for option in ("foreach", "differentiable"):
            if group.get(option) and self.backend not in (None, "reference"):
                raise RuntimeError(
                    f"{option}=True asks for the reference backend, backend={self.backend!r} for another"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._schedule = None
        self._checked = None
        self._fresh = set()
        self._warned = getattr(self, "_warned", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the one that it replaces.

        An option that the saved groups lack (a checkpoint of torch.optim.AdamW has no `agr`) keeps the value it has
        here, as do `foreach` and `fused`, which say how to compute and not what.
        """
        state_dict = dict(state_dict)
        saved = list(state_dict["param_groups"])
        if len(saved) == len(self.param_groups):
            for i, group in enumerate(self.param_groups):
                kept = {k: v for k, v in group.items() if k not in ("params", "step", "param_names")}
                here = {k: group[k] for k in ("foreach", "fused")}
                saved[i] = {**kept, **self._defaults_of_a_new_group(), **saved[i], **here}
        state_dict["param_groups"] = saved
        super().load_state_dict(state_dict)

    def _defaults_of_a_new_group(self) -> dict[str, Any]:
        """Return what a group has that has made no step."""
        return {}

    @property
    def backends(self) -> list[str]:
        """The names of the backends that the last step used; empty before the first."""
        return [] if self._schedule is None else self._schedule.backends

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients again, and returns the loss (optional).

        Returns:
            What `closure` returned, or None.

        Gradients are never written. Whatever can be checked is checked before anything changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        numbers = [self._numbers(group) for group in groups]
        if numbers != self._checked:
            for group in groups:
                self._check_group(group)
            self._checked = numbers
        schedule = self._current_schedule()
        try:
            self._run(schedule, numbers)
        finally:
            if schedule.watch is not None:
                schedule.watch.release()
        return loss

    def _run(self, schedule: Schedule, numbers: list[tuple[float, ...]]) -> None:
        if schedule.relaid:
            with torch.no_grad():
                for binding in schedule.relaid:
                    assert binding.relaid is not None
                    assert binding.parameter.grad is not None
                    binding.relaid.copy_(binding.parameter.grad)
        clip: Any = 1.0
        if self.max_grad_norm:
            clip = self._clip_coefficient(schedule)
        counted = self.param_groups if self._rule == "adan" else []
        # A native launch comes last and counts the groups' steps itself.
        for launch in schedule.launches:
            if isinstance(launch, CpuLaunch):
                launch.update(numbers, float(clip), counted)
                counted = []
            else:
                launch.update(self.param_groups, clip)
        for group in counted:
            group["step"] += 1
        if schedule.written:
            # As after any in-place operation of PyTorch, so that autograd notices a backward pass that comes too late.
            torch.autograd.graph.increment_version(schedule.written)
        if self._fresh:
            self._fresh.clear()
            for binding in schedule.bindings:
                binding.fresh = False

    def _clip_coefficient(self, schedule: Schedule) -> Any:
        """Return min(1, max_grad_norm / (norm + eps)), NaN for a norm of NaN."""
        squares: Any = 0.0
        for launch in schedule.launches:
            squares = squares + launch.square_sum()
        norm = squares**0.5
        coefficient = self.max_grad_norm / (norm + self.param_groups[0]["eps"])
        if isinstance(coefficient, Tensor):
            return coefficient.clamp(max=1.0)
        return 1.0 if coefficient > 1.0 else coefficient

    # The schedule.

    def _structure(self) -> list[Any]:
        options = itemgetter(*_STRUCTURE, *self._variant)
        return [self.max_grad_norm or 0, self.backend, *map(options, self.param_groups)]

    def _current_schedule(self) -> Schedule:
        schedule = self._schedule
        structure = self._structure()
        if (
            schedule is None
            or schedule.watch is None
            or schedule.structure != structure
            or not schedule.watch.unchanged(self.param_groups, self.state)
        ):
            self._schedule = None
            schedule = self._make_schedule(structure)
            self._schedule = schedule
        return schedule

    def _make_schedule(self, structure: list[Any]) -> Schedule:
        """Check every parameter, then make the state that is missing, then plan."""
        bindings = []
        index = -1
        for group_index, group in enumerate(self.param_groups):
            self._check_group(group)
            for number, parameter in enumerate(group["params"]):
                index += 1
                if parameter.grad is not None:
                    bindings.append(self._bind(index, group_index, number, parameter))
        made = [self._missing_state(binding) for binding in bindings]
        if not self._warned:
            self._warn_of_single_elements(bindings)
        # From here on nothing fails that could have been foreseen.
        for binding, state in zip(bindings, made, strict=True):
            if state:
                if self._rule == "adan" and "neg_pre_grad" in state and "neg_pre_grad" not in binding.state:
                    self._fresh.add(binding.parameter)
                binding.state.update(state)
                self.state[binding.parameter] = binding.state
            binding.fresh = binding.parameter in self._fresh
        return self._plan(structure, bindings)

    def _plan(self, structure: list[Any], bindings: list[Binding]) -> Schedule:
        schedule = Schedule(structure, bindings)
        referred = [b for b in bindings if b.backend == "reference"]
        on_cpu = [b for b in bindings if b.backend == "cpu"]
        if referred:
            schedule.launches.append(ReferenceLaunch(self._rule, referred))
        if on_cpu:
            schedule.launches.append(CpuLaunch(self._rule, on_cpu, clip=bool(self.max_grad_norm)))
        if backends.why_missing("cpu") is None:
            self._set_watch(schedule, on_cpu, referred)
        return schedule

    def _set_watch(self, schedule: Schedule, on_cpu: Sequence[Binding], referred: Sequence[Binding]) -> None:
        watch = backends.native().Watch(self.param_groups, self.state)
        for binding in referred:
            watch.add_untabled(binding.index)
        for slot, binding in enumerate(on_cpu):
            keys = [*binding.keys, "step"] if "step" in binding.state else [*binding.keys]
            watch.add(binding.index, keys, schedule.launches[-1].gradients, slot, binding.relaid)  # type: ignore[union-attr]
        schedule.watch = watch
        if not watch.unchanged(self.param_groups, self.state):
            raise RuntimeError("parameters, gradients or state were changed while the step was being planned")

    def _bind(self, index: int, group_index: int, number: int, parameter: Tensor) -> Binding:
        """Check a parameter, its gradient and its state, and choose its backend. Changes nothing."""
        group = self.param_groups[group_index]
        place = f"group {group_index}, parameter {number}"
        if "param_names" in group:
            place += f" ({group['param_names'][number]!r})"
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {place} is {gradient.layout}; {type(self).__name__} takes dense gradients"
            )
        if gradient.device != parameter.device:
            raise RuntimeError(
                f"the gradient of {place} is on {gradient.device}; it must be on {parameter.device}, as it is"
            )
        if gradient.shape != parameter.shape:
            raise RuntimeError(
                f"the gradient of {place} has shape {tuple(gradient.shape)}; it must have the parameter's, "
                f"{tuple(parameter.shape)}"
            )
        keys = self._state_keys(group)
        state = self.state.get(parameter, {})
        self._check_state(place, parameter, state, keys)
        backend = self._choose(place, group, parameter, gradient, [state[key] for key in keys if key in state])
        relaid = None
        if backend != "reference" and not same_layout(parameter, gradient):
            relaid = torch.empty_like(parameter, dtype=gradient.dtype, memory_format=torch.preserve_format).detach()
        return Binding(
            index, group_index, place, parameter, keys, backend, state,
            regularize=bool(group["agr"]), amsgrad=bool(group.get("amsgrad")), relaid=relaid,
        )  # fmt: skip

    def _check_state(self, place: str, parameter: Tensor, state: dict[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            value = state.get(key)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                raise RuntimeError(
                    f"{key} of {place} has {found}; it must be a tensor of shape {tuple(parameter.shape)}"
                )
            if value.device != parameter.device:
                raise RuntimeError(
                    f"{key} of {place} is on {value.device}; it must be on {parameter.device}, as the parameter"
                )

    def _choose(
        self, place: str, group: dict[str, Any], parameter: Tensor, gradient: Tensor, states: Sequence[Tensor]
    ) -> str:
        wants_reference = group["foreach"] or group.get("differentiable")
        backend = self.backend
        if backend is None:
            backend = "reference" if wants_reference else choose(parameter, gradient)
        reason = why_not(backend, parameter, gradient)
        if reason is None and backend != "reference":
            other = next((s for s in states if s.dtype != parameter.dtype or not is_plain(s)), None)
            if other is not None:
                reason = f"its state is a {other.dtype} {type(other).__name__}, the parameter {parameter.dtype}"
                if self.backend is None:
                    backend = "reference"
        if self.backend is not None and reason is not None:
            raise RuntimeError(f"backend={self.backend!r} does not take {place}: {reason}")
        if group["fused"] and backend == "reference":
            reasons = [reason or why_not(b, parameter, gradient) for b in backends.available_backends()[:-1]]
            why = "; ".join(r for r in reasons if r) or "backend='reference' was asked for"
            raise RuntimeError(f"fused=True refuses the reference backend for {place}, but {why}")
        return backend

    def _missing_state(self, binding: Binding) -> dict[str, Any]:
        """Return the state tensors that the parameter lacks, or that the backend needs in another layout."""
        made: dict[str, Any] = {}
        parameter = binding.parameter
        for key in binding.keys:
            value = binding.state.get(key)
            if value is None:
                made[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
            elif binding.backend != "reference" and not same_layout(parameter, value):
                made[key] = torch.empty_like(parameter, memory_format=torch.preserve_format).detach().copy_(value)
        return made

    def _warn_of_single_elements(self, bindings: Iterable[Binding]) -> None:
        places = [b.place for b in bindings if b.regularize and b.parameter.numel() == 1]
        if places:
            self._warned = True
            warnings.warn(
                "AGR makes the gradient of a tensor of one element exactly 0, so that it never trains: "
                f"{'; '.join(places)}. Put such parameters into a parameter group with agr=False",
                stacklevel=4,
            )
