"""What AdamW and Adan share: the interface of torch.optim.Optimizer, checks before a step, and the step."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends import check_backend
from .binding import Binding, same_layout
from .hooks import hooked, level_of_caller
from .launch import DeviceLaunch, Scaling, on_device
from .options import check_betas, check_nonnegative, number
from .schedule import Schedule, check_tensors, choose_backend, missing_state


def _snapshot(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return a group's numbers as they are now; for an lr on another device its identity, so as not to wait for it."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.device.type == "cpu" and lr.numel() == 1 else ("tensor", id(lr))
    return lr, tuple(group["betas"]), group["eps"], group["weight_decay"]


class AGROptimizer(torch.optim.Optimizer):
    """The base of `agr_cuda.AdamW` and `agr_cuda.Adan`."""

    #: The update rule's name in the native core, and how many betas it has.
    _rule: str
    _betas: int
    #: The group options that decide which kernels run and on what, as against the numbers that they run with.
    _structure: tuple[str, ...]

    #: torch.amp.GradScaler hands its scale and what it found to step(), instead of waiting for the device.
    _step_supports_amp_scaling = True

    _schedule: Schedule | None
    _checked: list[Any] | None  # the numbers that were last found in range
    _fresh: set[int]  # id of parameters whose state is made, and no step yet made with it
    _lock: threading.RLock  # held from the look at the parameters to the end of their update
    _warned: bool  # of tensors of one element
    _captured: dict[int, Tensor]  # by id: what launches captured into graphs read and write

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], max_grad_norm: float | None, backend: str | None
    ) -> None:
        if max_grad_norm is not None:
            check_nonnegative("max_grad_norm", max_grad_norm)
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

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return the group's numbers, some perhaps tensors, in the order in which the native core takes them."""
        raise NotImplementedError

    def _missing_state(self, binding: Binding) -> dict[str, Tensor]:
        """Return the state that a parameter lacks."""
        return missing_state(binding)

    # torch.optim.Optimizer's interface.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            for name in ("max_grad_norm", "backend"):
                if name in param_group:
                    raise ValueError(
                        f"{name} is {param_group[name]!r} in a parameter group; it is one setting for the whole "
                        f"optimizer: {type(self).__name__}(..., {name}={param_group[name]!r})"
                    )
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        if len({id(parameter) for parameter in parameters}) < len(parameters):
            self.param_groups.pop()
            raise ValueError("a parameter group has a parameter more than once; each must be given once")

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a number out of range, RuntimeError for options that contradict each other."""
        check_nonnegative("lr", group["lr"])
        check_betas(group["betas"], self._betas)
        check_nonnegative("eps", group["eps"])
        check_nonnegative("weight_decay", group["weight_decay"])
        if group["fused"]:
            if group["foreach"]:
                raise RuntimeError("fused=True refuses the reference backend, and foreach=True asks for it")
            if group.get("differentiable"):
                raise RuntimeError("fused=True refuses the reference backend, and only that is differentiable")
            if self.backend == "reference":
                raise RuntimeError("fused=True refuses the reference backend, and backend='reference' asks for it")
        for option in ("foreach", "differentiable"):
            if group.get(option) and self.backend not in (None, "reference"):
                raise RuntimeError(f"{option}=True asks for the reference backend, and backend is {self.backend!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**self._unsaved_options(), **self.defaults}.items():
                group.setdefault(name, value)
        self._forget()

    def _forget(self) -> None:
        self._schedule = None
        self._checked = None
        self._fresh = set()
        self._warned = getattr(self, "_warned", False)
        self._captured = getattr(self, "_captured", {})
        self._lock = getattr(self, "_lock", None) or threading.RLock()

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
                saved[i] = {**kept, **self._unsaved_options(), **saved[i], **here}
        state_dict["param_groups"] = saved
        super().load_state_dict(state_dict)

    def _unsaved_options(self) -> dict[str, Any]:
        """Return the options that mean something else than "as it is here" where a checkpoint lacks them."""
        return {}

    @property
    def backends(self) -> list[str]:
        """The names of the backends that the last step used; empty before the first."""
        return [] if self._schedule is None else self._schedule.backends

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @hooked
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
        with self._lock:
            self._check_numbers()
            try:
                self._run(self._current_schedule(), Scaling.asked_of(self))
            finally:
                if self._schedule is not None:
                    self._schedule.release()
        return loss

    def _check_numbers(self) -> None:
        numbers = [self.max_grad_norm, *map(_snapshot, self.param_groups)]
        if numbers != self._checked:
            if self.max_grad_norm is not None:
                check_nonnegative("max_grad_norm", self.max_grad_norm)
            for group in self.param_groups:
                self._check_group(group)
            self._checked = numbers

    def _current_schedule(self) -> Schedule:
        options = itemgetter(*self._structure)
        structure = [bool(self.max_grad_norm), self.backend, *map(options, self.param_groups)]
        schedule = self._schedule
        if schedule is not None and schedule.structure == structure and schedule.fits(self.param_groups, self.state):
            # The watch knows where the native backends' tensors are; others it leaves to us.
            for b in schedule.referred:
                check_tensors(b.place, b.parameter, b.state, b.keys)
            if not any(self._missing_state(b) for b in schedule.referred):
                return schedule
        self._settle()
        self._schedule = None
        bindings = self._bind_all()
        clip = bool(self.max_grad_norm)
        schedule = Schedule(self._rule, structure, bindings, self.param_groups, self.state, clip)
        if schedule.written and not schedule.fits(self.param_groups, self.state):
            raise RuntimeError("parameters, gradients or state were changed by another thread during step()")
        self._schedule = schedule
        return schedule

    def _settle(self) -> None:
        """Ask the devices which states a step has been made with, where the host does not know."""
        schedule = self._schedule
        for launch in [] if schedule is None else schedule.launches:
            if launch.unsettled:
                begun = launch.begun()
                for binding, has_begun in zip(launch.bindings, begun, strict=True):
                    if has_begun:
                        self._fresh.discard(id(binding.parameter))
                # Replays of a graph make steps of which nobody is told.
                launch.unsettled = launch.captured and not all(begun)

    def _bind_all(self) -> list[Binding]:
        """Check every parameter that has a gradient, then make the state that is missing."""
        bindings = []
        index = -1
        for group_index, group in enumerate(self.param_groups):
            self._check_group(group)
            for position, parameter in enumerate(group["params"]):
                index += 1
                if parameter.grad is not None:
                    bindings.append(self._bind(index, group_index, position, parameter))
        made = [self._missing_state(binding) for binding in bindings]
        self._warn_of_single_elements(bindings)
        # From here on nothing fails that could have been foreseen.
        for binding, state in zip(bindings, made, strict=True):
            if self._rule == "adan" and "neg_pre_grad" not in binding.state:
                self._fresh.add(id(binding.parameter))
            binding.fresh = id(binding.parameter) in self._fresh
            if state:
                binding.state.update(state)
                self.state[binding.parameter] = binding.state
        return bindings

    def _bind(self, index: int, group_index: int, position: int, parameter: Tensor) -> Binding:
        group = self.param_groups[group_index]
        place = f"group {group_index}, parameter {position}"
        if position < len(group.get("param_names", ())):
            place += f" ({group['param_names'][position]!r})"
        gradient = parameter.grad
        assert gradient is not None
        keys = self._state_keys(group)
        state = self.state.get(parameter, {})
        check_tensors(place, parameter, state, keys)
        backend = choose_backend(
            place, group, parameter, [state[k] for k in keys if state.get(k) is not None], self.backend
        )
        relaid = None
        if backend != "reference" and not same_layout(parameter, gradient):
            relaid = torch.empty_like(parameter, dtype=gradient.dtype, memory_format=torch.preserve_format).detach()
        return Binding(
            index, group_index, place, parameter, keys, backend, state,
            regularize=bool(group["agr"]), amsgrad=bool(group.get("amsgrad")), relaid=relaid,
        )  # fmt: skip

    def _warn_of_single_elements(self, bindings: list[Binding]) -> None:
        places = [b.place for b in bindings if b.regularize and b.parameter.numel() == 1]
        if places and not self._warned:
            self._warned = True
            warnings.warn(
                "AGR makes the gradient of a tensor of one element exactly 0, so that it never trains: "
                f"{'; '.join(places)}. Put such parameters into a parameter group with agr=False",
                stacklevel=level_of_caller(),
            )

    def _run(self, schedule: Schedule, scaling: Scaling) -> None:
        if scaling.found_inf is not None and schedule.on_host and number(scaling.found_inf) != 0:
            return
        if schedule.launches:
            self._check_capture(schedule)
        self._count_on_devices(schedule, scaling)
        if schedule.relaid:
            with torch.no_grad():
                for binding in schedule.relaid:
                    assert binding.relaid is not None
                    assert binding.parameter.grad is not None
                    binding.relaid.copy_(binding.parameter.grad)
        # Whatever may fail comes before the first update.
        numbers = [self._numbers(group) for group in self.param_groups]
        on_devices = [[self._on_device(group, launch) for group in numbers] for launch in schedule.launches]
        clip: Any = 1.0
        # Then the launch takes the norm itself.
        alone = len(schedule.launches) == 1 and schedule.launches[0].takes_norm and not schedule.on_host
        if self.max_grad_norm and not alone:
            clip = self._clip_coefficient(schedule, on_devices, scaling)
        if schedule.cpu is not None:  # before a launch raises step counts among them
            host_numbers = [tuple(number(x) if isinstance(x, Tensor) else x for x in group) for group in numbers]
        if schedule.on_host:
            on_host = clip if scaling.grad_scale is None else clip / number(scaling.grad_scale)
            native_clip = number(on_host)
        if schedule.reference is not None:
            schedule.reference.update(self.param_groups, on_host)
        counted = self._counted_by_host()
        # What is noted last is noted by the native call that makes the last update, in the same breath. A launch that
        # may make no step leaves it to the device to note that.
        unknown = scaling.found_inf is not None and not schedule.on_host
        stepped = [id(b.parameter) for b in schedule.bindings] if self._fresh and not unknown else []
        for i, launch in enumerate(schedule.launches):
            last = schedule.cpu is None and i + 1 == len(schedule.launches)
            launch.update(
                on_devices[i],
                float(self.max_grad_norm or 0) if alone else 0.0,
                self.param_groups[0]["eps"],
                clip.to(launch.device, torch.float64) if isinstance(clip, Tensor) else None,
                scaling,
                counted if last else [],
                self._fresh,
                stepped if last else [],
            )
            launch.unsettled = launch.unsettled or (unknown and bool(self._fresh))
            if launch.unkept:
                self._keep_for_graphs(launch)
                launch.unkept = False
        if schedule.cpu is not None:
            schedule.cpu.update(host_numbers, native_clip, counted, self._fresh, stepped)
        elif not schedule.launches:
            for group in counted:
                group["step"] += 1
            self._fresh.difference_update(stepped)
        schedule.count_changes()
        if stepped:
            for binding in schedule.bindings:
                binding.fresh = False

    def _on_device(self, numbers: tuple[Any, ...], launch: DeviceLaunch) -> tuple[Any, ...]:
        return tuple(on_device(x, launch.device, launch.kernel_reads) if isinstance(x, Tensor) else x for x in numbers)

    def _clip_coefficient(
        self, schedule: Schedule, on_devices: list[list[tuple[Any, ...]]], scaling: Scaling
    ) -> float | Tensor:
        """Return min(1, max_grad_norm / (norm + eps)), NaN for a norm of NaN, where the norm is of unscaled gradients.

        It is a tensor if the reference or a GPU has a part in it, so that the host need not wait for it.
        """
        squares: Any = 0.0
        for launch, numbers in zip(schedule.launches, on_devices, strict=True):
            of_launch = launch.reduce(numbers, scaling)
            squares = squares + (of_launch if isinstance(squares, float) else of_launch.to(squares.device))
        if schedule.cpu is not None:
            squares = squares + schedule.cpu.square_sum()
        if schedule.reference is not None:
            of_reference = schedule.reference.square_sum(self.param_groups)
            if isinstance(squares, Tensor) and isinstance(of_reference, Tensor):
                of_reference = of_reference.to(squares.device)
            squares = squares + of_reference
        norm = squares**0.5
        if scaling.grad_scale is not None:
            scale = scaling.grad_scale
            norm = norm / (scale.to(norm.device) if isinstance(norm, Tensor) else number(scale))
        divisor = norm + self.param_groups[0]["eps"]
        most = float(self.max_grad_norm or 0.0)
        if isinstance(divisor, Tensor):
            return torch.where(divisor == 0, 1.0, most / divisor).clamp(max=1.0)
        quotient = most / divisor if divisor != 0 else 1.0
        return 1.0 if quotient > 1.0 else quotient

    # Graphs, and step counts on devices.

    def _check_capture(self, schedule: Schedule) -> None:
        """Raise RuntimeError if a graph is being captured with step counts or numbers that it would repeat."""
        if all(group["capturable"] for group in self.param_groups):
            return
        if any(launch.capturing() for launch in schedule.launches):
            index = next(i for i, group in enumerate(self.param_groups) if not group["capturable"])
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, and group {index} has capturable=False; it must be True"
            )

    def _count_on_devices(self, schedule: Schedule, scaling: Scaling) -> None:
        """Put step counts of groups on a device where the host cannot know them, and back where no device counts."""

    def _counted_by_host(self) -> list[dict[str, Any]]:
        """Return the groups whose step count is a number."""
        return []

    def _keep_for_graphs(self, launch: DeviceLaunch) -> None:
        """Keep what a captured launch reads and writes for as long as the optimizer lives, since the graph may."""
        counts = [group["step"] for group in self.param_groups if isinstance(group.get("step"), Tensor)]
        for tensor in (*counts, *launch.kept_for_graphs()):
            self._captured[id(tensor)] = tensor
