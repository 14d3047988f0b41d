"""What AdamW and Adan share: the interface of torch.optim.Optimizer, checks before a step, and the step."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends import check_backend
from .bind import bind, check_changeable, check_tensors, state_change
from .clipping import Clipping, clipping
from .fork import remember
from .groups import ParameterGroup
from .hooks import hooked, level_of_caller, passed_by_compilers
from .options import FLAGS, check_betas, check_flag, check_nonnegative, make_plain, number
from .plan import StepPlan
from .scaling import Scaling
from .tensors import Binding, StateTensor

#: The options that are one for the whole optimizer: in its `defaults`, and in no group.
OF_ALL_GROUPS = ("max_grad_norm", "backend")


def _known(value: Any) -> Any:
    """Return a number as it is now; for a tensor on another device its identity, so as not to wait for it."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.device.type == "cpu" and value.numel() == 1 else ("tensor", id(value))


def _snapshot(group: dict[str, Any]) -> Any:
    """Return what has to be checked anew when it changes, and is not among the options that decide what is launched."""
    numbers = (group["lr"], group["eps"], group["weight_decay"], *group["betas"])
    of_all_groups = group.get("max_grad_norm"), group.get("backend")
    return [x if type(x) is float else _known(x) for x in numbers], group["maximize"], of_all_groups


class AGROptimizer(torch.optim.Optimizer):
    """The base of `agr_cuda.AdamW` and `agr_cuda.Adan`."""

    #: The update rule's name in the native core, and how many betas it has.
    _rule: str
    _betas: int
    #: The group options that decide which kernels run and on what, as against the numbers that they run with.
    _structure: tuple[str, ...]

    _plan: StepPlan | None
    _checked: list[Any] | None  # the numbers that were last found in range
    _lock: threading.RLock  # held from the look at the parameters to the end of their update
    _warned: set[str]  # of what
    _hooked: set[str]  # what registers hooks that are there for the moment
    _captured: dict[int, Tensor]  # by id: what launches captured into graphs read and write
    _clipping: Clipping  # of the last step

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["max_grad_norm"] is not None:
            check_nonnegative("max_grad_norm", defaults["max_grad_norm"])
            defaults["max_grad_norm"] = number(defaults["max_grad_norm"])
        check_backend(defaults["backend"])
        self.defaults = defaults
        self._check_group(defaults)
        make_plain(defaults)
        self._forget()
        # Not super(): AdamW has torch.optim.AdamW for a base, whose constructor takes other arguments.
        torch.optim.Optimizer.__init__(self, params, defaults)

    @property
    def max_grad_norm(self) -> float | None:
        """What the global norm is clipped to; None or 0 does not clip. One number for all groups."""
        value: float | None = self.defaults["max_grad_norm"]
        return value

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.defaults["max_grad_norm"] = value

    @property
    def backend(self) -> str | None:
        """The backend asked for, or None to choose for each parameter."""
        value: str | None = self.defaults["backend"]
        return value

    @backend.setter
    def backend(self, value: str | None) -> None:
        check_backend(value)
        self.defaults["backend"] = value

    @property
    def grad_norm(self) -> Tensor | None:
        """The global L2 norm of the last step's gradients, unscaled, before clipping and AGR.

        A float64 of no dimensions on the device that took it for `max_grad_norm`; nothing waits for that. None before
        the first step, and where `max_grad_norm` does not clip. After a step that mixed precision skipped it is not
        finite, or that of the step before.
        """
        return self._clipping.measured()

    # What a rule says of itself.

    def _states(self, group: dict[str, Any]) -> tuple[StateTensor, ...]:
        """Return what the rule keeps of each parameter of a group, in the order of the rule."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return the group's numbers, some perhaps tensors, in the order in which the native core takes them."""
        raise NotImplementedError

    def _clip_eps(self) -> float:
        """Return what clipping adds to the norm."""
        raise NotImplementedError

    def _place_counts(self, plan: StepPlan, scaling: Scaling) -> None:
        """Put step counts of groups on a device where the host cannot know them, and back where no device counts."""

    def _counted_by_host(self) -> list[dict[str, Any]]:
        """Return the groups whose step count is a number."""
        return []

    # torch.optim.Optimizer's interface.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see torch.optim.Optimizer.add_param_group.

        The dictionary is copied. `max_grad_norm` and `backend` may be in it where they are the optimizer's own.
        """
        if isinstance(param_group, dict):
            param_group = ParameterGroup(param_group)
            for name, value in self.defaults.items():
                param_group.setdefault(name, value)
            self._check_group(param_group)
            make_plain(param_group)
        super().add_param_group(param_group)
        for name in OF_ALL_GROUPS:
            del param_group[name]
        parameters = self.param_groups[-1]["params"]
        if len({id(parameter) for parameter in parameters}) < len(parameters):
            self.param_groups.pop()
            raise ValueError("a parameter group has a parameter more than once; each must be given once")

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise TypeError for a wrong type, ValueError for what is out of range, RuntimeError for a contradiction."""
        for name in OF_ALL_GROUPS:
            if name in group and (group[name] or None) != (self.defaults[name] or None):
                raise ValueError(
                    f"{name} is {group[name]!r} in a parameter group, and {self.defaults[name]!r} for the optimizer; "
                    f"it is one setting for all groups: {type(self).__name__}(..., {name}={group[name]!r})"
                )
        for name in FLAGS:
            if name in group:
                check_flag(name, group[name])
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # not super(), as in the constructor
        if "differentiable" not in self._structure:  # which torch.optim.Optimizer sees to
            self.defaults.pop("differentiable", None)
        self.param_groups = [self._completed(group) for group in self.param_groups]
        self._forget()

    def _completed(self, group: dict[str, Any]) -> ParameterGroup:
        """Return a group with every option that it lacks."""
        completed = group if isinstance(group, ParameterGroup) else ParameterGroup(group)
        for name, value in {**self._unsaved_options(), **self.defaults}.items():
            if name not in OF_ALL_GROUPS:
                completed.setdefault(name, value)
        return completed

    def _forget(self) -> None:
        if self.defaults["fused"]:
            # torch.amp.GradScaler hands its scale and what it found to step(), instead of waiting for the device. Said
            # of instances, as torch's optimizers say it: whoever clips gradients in between, or wants to know of
            # skipped steps, asks for this, and has them unscaled before.
            self._step_supports_amp_scaling = True
        self._plan = None
        self._checked = None
        self._warned = getattr(self, "_warned", set())
        self._captured = getattr(self, "_captured", {})
        self._hooked = getattr(self, "_hooked", set())
        self._lock = getattr(self, "_lock", None) or threading.RLock()
        self._clipping = Clipping()
        remember(self)
        passed_by_compilers(AGROptimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the one that it replaces.

        An option that the saved groups lack (`agr`, always) keeps the value it has here, as do `foreach` and `fused`,
        which say how to compute and not what. As in torch.optim, tensors that have the right type and device already
        are taken as they are: after loading the state_dict() of an optimizer that goes on, both would write the same
        averages. Load a copy.deepcopy of it.
        """
        # After the hooks that a program has registered: they may change what is loaded into what is known here.
        with self._hook(self.register_load_state_dict_pre_hook, self._adapted):
            super().load_state_dict(state_dict)

    @contextmanager
    def _hook(
        self, register: Callable[..., Any], change: Callable[[dict[str, Any]], Any], **where: Any
    ) -> Iterator[None]:
        """Register a hook for as long as this lasts; a hook that leads to the same again finds it there."""
        with self._lock:
            if register.__name__ in self._hooked:
                yield
                return
            self._hooked.add(register.__name__)
            registered = register(lambda _, state_dict: change(state_dict), **where)
            try:
                yield
            finally:
                registered.remove()
                self._hooked.remove(register.__name__)

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with the groups' options as this optimizer takes them. The one given stays as it is."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        if len(groups) == len(self.param_groups):
            for i, (group, here) in enumerate(zip(groups, self.param_groups, strict=True)):
                kept = {k: here.get(k, v) for k, v in self.defaults.items() if k not in OF_ALL_GROUPS}
                own = {k: kept[k] for k in ("foreach", "fused")}
                groups[i] = {**kept, **self._unsaved_options(), **group, **own}
                for name in OF_ALL_GROUPS:  # of whoever saved it
                    groups[i].pop(name, None)
                self._check_group(groups[i])
                make_plain(groups[i])
        return {**state_dict, "param_groups": groups}

    def _unsaved_options(self) -> dict[str, Any]:
        """Return the options that mean something else than "as it is here" where a checkpoint lacks them."""
        return {}

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            shown = {**group, "agr": group.get("agr")}
            lines += [f"    {key}: {shown[key]}" for key in sorted(shown) if key != "params"]
        return "\n".join([*lines, ")"])

    @property
    def backends(self) -> list[str]:
        """The names of the backends that the last step used; empty before the first."""
        return [] if self._plan is None else self._plan.backends

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
                self._make(self._plan_for_step())
            finally:
                if self._plan is not None:
                    self._plan.release()
        return loss

    def _make(self, plan: StepPlan) -> None:
        """Make the step that is planned, unless mixed precision skips it. Whatever may fail comes before any update."""
        scaling = Scaling.asked_of(self)
        if plan.on_host and scaling.skips():
            return
        self._check_capture(plan)
        self._place_counts(plan, scaling)
        plan.stage_gradients()
        numbers = [self._numbers(group) for group in self.param_groups]
        for launch in plan.launches:
            launch.prepare(self.param_groups, numbers, scaling)
        self._clipping = clipping(plan.launches, float(self.max_grad_norm or 0), self._clip_eps())
        counted = self._counted_by_host()
        for launch in plan.launches:
            launch.update(self._clipping, counted if launch is plan.launches[-1] else [])
        if not plan.launches:
            for group in counted:
                group["step"] += 1
        self._keep_for_graphs(plan)
        plan.count_changes()

    def _check_numbers(self) -> None:
        for i, group in enumerate(self.param_groups):
            if "agr" not in group:  # which is not among the keys of ours; see ParameterGroup
                group["agr"] = self.defaults["agr"]
                self._warn_once("agr", f"parameter group {i} came without agr; it has the default, {group['agr']}")
        numbers = [self.max_grad_norm, *map(_snapshot, self.param_groups)]
        if numbers != self._checked:
            if self.max_grad_norm is not None:
                check_nonnegative("max_grad_norm", self.max_grad_norm)
            for group in self.param_groups:
                self._check_group(group)
            self._checked = numbers

    def _plan_for_step(self) -> StepPlan:
        """Return a plan that fits, the last one if nothing has moved, with this step's gradients read."""
        options = itemgetter(*self._structure)
        structure = [bool(self.max_grad_norm), self.backend, *map(options, self.param_groups)]
        plan = self._plan
        if (
            plan is not None
            and plan.structure == structure
            and plan.fits(self.param_groups, self.state)
            # The watch knows where the native backends' tensors are; others it leaves to us.
            and self._still_bound(plan.by_reference)
        ):
            return plan
        for group in self.param_groups:
            self._check_group(group)
        self._plan = None
        bindings = bind(self, [] if plan is None else plan.bindings)
        self._warn_of_single_elements(bindings)
        self._warn_of_wrappers(bindings)
        clip = bool(self.max_grad_norm)
        plan = StepPlan(self._rule, structure, bindings, self.param_groups, self.state, clip)
        if not plan.fits(self.param_groups, self.state) and plan.written:
            raise RuntimeError("parameters, gradients or state were changed by another thread during step()")
        self._plan = plan
        return plan

    def _still_bound(self, bindings: Sequence[Binding]) -> bool:
        """Whether the reference backend's bindings are as they were; raise RuntimeError for what it cannot take."""
        present = [b for b in bindings if b.parameter.grad is not None]
        for b in present:
            check_tensors(b.place, b.parameter, b.state, b.states)
            check_changeable(b.place, b.parameter, b.state)
        return not any(state_change(self, b) for b in present)

    def _warn_of_single_elements(self, bindings: list[Binding]) -> None:
        places = [b.place for b in bindings if b.regularize and b.parameter.numel() == 1]
        if places:
            self._warn_once(
                "single elements",
                "AGR makes the gradient of a tensor of one element exactly 0, so that it never trains: "
                f"{'; '.join(places)}. Put such parameters into a parameter group with agr=False",
            )

    def _warn_of_wrappers(self, bindings: list[Binding]) -> None:
        found = [b for b in bindings if b.backend == "reference" and self.param_groups[b.group]["fused"]]
        if found:
            self._warn_once(
                "wrappers",
                f"fused=True asks for fused kernels, and none takes a {type(found[0].parameter).__name__}: the "
                f"reference backend updates {found[0].place}"
                + (f" and {len(found) - 1} others" if len(found) > 1 else ""),
            )

    def _warn_once(self, of: str, message: str) -> None:
        if of not in self._warned:
            self._warned.add(of)
            warnings.warn(message, stacklevel=level_of_caller())

    def _check_capture(self, plan: StepPlan) -> None:
        """Raise RuntimeError if a graph is being captured with step counts or numbers that it would repeat."""
        fixed = [index for index, group in enumerate(self.param_groups) if not group["capturable"]]
        if fixed and any(launch.capturing() for launch in plan.on_devices):
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, and group {fixed[0]} has capturable=False; it must be True"
            )

    def _keep_for_graphs(self, plan: StepPlan) -> None:
        """Keep what captured launches read and write for as long as the optimizer lives, since a graph may."""
        for launch in plan.on_devices:
            if launch.newly_captured:
                launch.newly_captured = False
                counts = [group["step"] for group in self.param_groups if isinstance(group.get("step"), Tensor)]
                for tensor in (*counts, *launch.kept_for_graphs()):
                    self._captured[id(tensor)] = tensor
