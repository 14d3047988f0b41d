"""The base class of AdamW and Adan: torch.optim.Optimizer's interface, the checks before a step, and the step."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from operator import itemgetter
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends import check_backend, missing_kernels
from .bind import bind, check_tensors, check_writable, state_change
from .clipping import Clipping, prepare_clipping
from .fork import renew_lock_after_fork
from .groups import UNSAVED_OPTIONS, ParameterGroup, converts_state
from .hooks import caller_stacklevel, exclude_from_compile, with_step_hooks
from .loading import keep_dtypes, take_loaded
from .masters import MasterSource, master_sources, set_parameter
from .options import BOOLEAN_OPTIONS, check_betas, check_flag, check_nonnegative, convert_to_builtin, number
from .plan import StepPlan
from .precision import PRECISION_OPTIONS, Precision, check_precision, check_precision_options
from .scaling import Scaling
from .sharding import Exchange, check_distributed, check_norm_of_all, check_redundancy, check_whole, has_these_parts
from .tensors import MASTER, Binding, StateTensor, is_plain, ordinary_mode, stored_state

if TYPE_CHECKING:
    from .gradient_release import GradientRelease

#: The options that hold for the whole optimizer. They are in its `defaults` and in no parameter group.
OPTIMIZER_OPTIONS = ("max_grad_norm", "backend")


def _comparable(value: Any) -> Any:
    """Return a value to compare with a later one: the number, or the identity of a tensor on a GPU.

    Reading the number from a GPU would make the host wait for the device.
    """
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.device.type == "cpu" and value.numel() == 1 else ("tensor", id(value))


def _values_to_check(group: dict[str, Any]) -> Any:
    """Return the option values of a group that are checked again when they change.

    A change of the other options, `_launch_options`, makes a new plan, and they are checked then.
    """
    numbers = (group["lr"], group["eps"], group["weight_decay"], *group["betas"])
    others = group["maximize"], group["rounding_seed"], group.get("max_grad_norm"), group.get("backend")
    return [x if type(x) is float else _comparable(x) for x in numbers], others


@dataclass(frozen=True)
class Origin:
    """The place of an optimizer's first parameter in the program's optimizer, of which it has a part or all."""

    group: int
    parameter: int  # in the group
    index: int  # counted over all groups


class AGROptimizer(torch.optim.Optimizer):
    """The base class of `agr_cuda.AdamW` and `agr_cuda.Adan`."""

    #: The update rule's name in the native core.
    _rule: str
    #: The number of betas.
    _num_betas: int
    #: The group options that decide which kernels run on which tensors. A plan is made for one set of their values.
    _launch_options: tuple[str, ...]

    _plan: StepPlan | None
    _checked_values: list[Any] | None  # the option values that were last checked
    _lock: threading.RLock  # held from the check of the plan to the end of the update
    _warned: set[str]  # the topics of which a warning has been given
    _active_hooks: set[str]  # the names of the register functions whose temporary hook is in place
    _graph_tensors: dict[int, Tensor]  # by id(): the tensors that captured graphs read or write
    _clipping: Clipping  # the clipping of the last step
    _release: GradientRelease | None  # what updates parameters as soon as they have a gradient
    _origin = Origin(0, 0, 0)  # elsewhere in the small optimizers of a release alone

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["max_grad_norm"] is not None:
            check_nonnegative("max_grad_norm", defaults["max_grad_norm"])
            defaults["max_grad_norm"] = number(defaults["max_grad_norm"])
            check_redundancy(defaults["max_grad_norm"])
        check_backend(defaults["backend"])
        self.defaults = defaults
        self._check_group(defaults)
        convert_to_builtin(defaults)
        self._reset_runtime_state()
        # Not super().__init__: AdamW's next base class is torch.optim.AdamW, whose constructor takes other arguments.
        torch.optim.Optimizer.__init__(self, params, defaults)

    @property
    def max_grad_norm(self) -> float | None:
        """The largest global norm of the gradients; None or 0 does not clip. It is one number for all groups."""
        value: float | None = self.defaults["max_grad_norm"]
        return value

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.defaults["max_grad_norm"] = value

    @property
    def backend(self) -> str | None:
        """The requested backend, or None to choose one for each parameter."""
        value: str | None = self.defaults["backend"]
        return value

    @backend.setter
    def backend(self, value: str | None) -> None:
        check_backend(value)
        self.defaults["backend"] = value

    @property
    def grad_norm(self) -> Tensor | None:
        """The global L2 norm of the last step's unscaled gradients, before clipping and AGR.

        It is a zero-dimensional float64 tensor on the device that computed it; the property does not synchronize. It is
        None before the first step, and if `max_grad_norm` is None or 0. After a step that mixed precision skipped, it
        is not finite, or is still the norm of the step before.
        """
        return self._clipping.measured_norm()

    # Defined by each optimizer.

    def _declared_state(self, group: dict[str, Any]) -> tuple[StateTensor, ...]:
        """Return the state tensors that the update rule has for each parameter of a group, in the rule's order."""
        raise NotImplementedError

    def _hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return the group's hyperparameters, as numbers or tensors, in the native core's order."""
        raise NotImplementedError

    def _clip_eps(self) -> float:
        """Return the number that clipping adds to the norm."""
        raise NotImplementedError

    def _place_step_counts(self, plan: StepPlan, scaling: Scaling) -> None:
        """Move the groups' step counts to a device if the host cannot know them, and back if no device counts."""

    def _groups_counted_on_host(self) -> list[dict[str, Any]]:
        """Return the groups whose step count is a number, which the host increments."""
        return []

    # torch.optim.Optimizer's interface.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with the optimizer's defaults for missing options; see torch.optim.Optimizer.

        The dictionary is copied. It may contain `max_grad_norm` and `backend` only with the optimizer's own values.

        Raises:
            TypeError: for an option or a parameter of the wrong type.
            ValueError: for an option out of range, and for a parameter that is given twice or is already in a group.
            RuntimeError: for options that contradict each other.
        """
        if isinstance(param_group, dict):
            param_group = ParameterGroup(param_group)
            for name, value in self.defaults.items():
                param_group.setdefault(name, value)
            self._check_group(param_group)
            convert_to_builtin(param_group)
        super().add_param_group(param_group)
        for name in OPTIMIZER_OPTIONS:
            del param_group[name]
        parameters = self.param_groups[-1]["params"]
        if len({id(parameter) for parameter in parameters}) < len(parameters):
            self.param_groups.pop()
            raise ValueError("a parameter group has a parameter more than once; each must be given once")

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise TypeError for a wrong type, ValueError for a value out of range, RuntimeError for a contradiction."""
        for name in OPTIMIZER_OPTIONS:
            if name in group and (group[name] or None) != (self.defaults[name] or None):
                raise ValueError(
                    f"{name} is {group[name]!r} in a parameter group, and {self.defaults[name]!r} for the optimizer; "
                    f"it is one setting for all groups: {type(self).__name__}(..., {name}={group[name]!r})"
                )
        for name in BOOLEAN_OPTIONS:
            if name in group:
                check_flag(name, group[name])
        check_nonnegative("lr", group["lr"])
        check_betas(group["betas"], self._num_betas)
        check_nonnegative("eps", group["eps"])
        check_nonnegative("weight_decay", group["weight_decay"])
        check_precision_options(group)
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
        torch.optim.Optimizer.__setstate__(self, state)  # not super(), for the reason given in the constructor
        # An optimizer that was pickled before an option existed lacks it.
        # Options are those of AdamW or Adan; the constructor of a subclass may take anything.
        rule = next(base for base in type(self).__mro__ if "_rule" in vars(base))
        options = signature(rule).parameters.values()
        known = {option.name: option.default for option in options if option.default is not option.empty}
        self.defaults.update({name: value for name, value in known.items() if name not in self.defaults})
        if "differentiable" not in self._launch_options:  # torch.optim.Optimizer has added it to the defaults.
            self.defaults.pop("differentiable", None)
        self.param_groups = [self._with_defaults(group) for group in self.param_groups]
        self._reset_runtime_state()

    def _with_defaults(self, group: dict[str, Any]) -> ParameterGroup:
        """Return a group with its missing options set to their defaults."""
        completed = group if isinstance(group, ParameterGroup) else ParameterGroup(group)
        for name, value in {**self._options_if_missing(), **self.defaults}.items():
            if name not in OPTIMIZER_OPTIONS:
                completed.setdefault(name, value)
        return completed

    def _reset_runtime_state(self) -> None:
        """Set up everything that is not saved with the optimizer: the plan, caches and the lock."""
        if self.defaults["fused"]:
            # With this attribute, torch.amp.GradScaler leaves the gradients scaled, hands grad_scale and found_inf to
            # step(), and does not wait for the device. As in torch.optim, only optimizers with fused=True have it:
            # libraries that clip gradients before step(), or that detect skipped steps, check for it, and rely on
            # GradScaler to unscale the gradients if it is absent.
            self._step_supports_amp_scaling = True
        self._plan = None
        self._checked_values = None
        self._warned = getattr(self, "_warned", set())
        self._graph_tensors = getattr(self, "_graph_tensors", {})
        self._active_hooks = getattr(self, "_active_hooks", set())
        self._lock = getattr(self, "_lock", None) or threading.RLock()
        self._clipping = Clipping()
        self._release = getattr(self, "_release", None)
        renew_lock_after_fork(self)
        exclude_from_compile(AGROptimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the one that it replaces.

        An option that the saved groups lack keeps its current value. So do `agr` and the options of precision, which
        are not saved, and `foreach` and `fused`, which decide how to compute and not what. As in torch.optim, state
        tensors that already have the right dtype and device are not copied: after loading the state_dict() of an
        optimizer that is still in use, both optimizers would write to the same averages. Load a copy.deepcopy of it
        instead.

        Raises:
            ValueError: for groups that do not match this optimizer's, and for an option out of range.
            TypeError: for an option of the wrong type.
            RuntimeError: for options that contradict each other and, in Adan, for a group with state but no "step".

        Whatever is raised, by hooks too, the optimizer keeps the options and the state that it had.
        """
        before = dict(vars(self))
        # The first hook runs after those that the program has registered, which may convert a foreign state dict; the
        # second before the program's, which see the state as it is going to be.
        with (
            self._temporary_hook(self.register_load_state_dict_post_hook, lambda _: self._take_loaded(), prepend=True),
            self._temporary_hook(
                self.register_load_state_dict_pre_hook,
                lambda saved: keep_dtypes(self._adapt_state_dict(saved)),
            ),
        ):
            try:
                super().load_state_dict(state_dict)
            except BaseException:
                vars(self).clear()
                vars(self).update(before)
                raise

    def _take_loaded(self) -> None:
        """Store the loaded state as the groups' options say."""
        for group in self.param_groups:
            converts_state(group)  # Later steps convert what is stored here.
            for parameter in group["params"]:
                specs = stored_state(self._declared_state(group), Precision.of(parameter, group))
                if parameter in self.state and take_loaded(parameter, self.state[parameter], specs):
                    self._warn_once(
                        "masters",
                        "the loaded state dict has master weights of parameters that have none here: "
                        "load_master_weights(state_dict) sets the parameters to them",
                    )

    @contextmanager
    def _temporary_hook(
        self, register: Callable[..., Any], change: Callable[[dict[str, Any]], Any], **where: Any
    ) -> Iterator[None]:
        """Register a hook within this context. If it is already in place, because of a nested call, do nothing."""
        with self._lock:
            if register.__name__ in self._active_hooks:
                yield
                return
            self._active_hooks.add(register.__name__)
            registered = register(lambda *arguments: change(arguments[-1]), **where)
            try:
                yield
            finally:
                registered.remove()
                self._active_hooks.remove(register.__name__)

    def _adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a state dict whose groups have the options that this optimizer needs."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        if len(groups) == len(self.param_groups):
            for i, (group, here) in enumerate(zip(groups, self.param_groups, strict=True)):
                kept = {k: here.get(k, v) for k, v in self.defaults.items() if k not in OPTIMIZER_OPTIONS}
                own = {k: kept[k] for k in ("agr", "foreach", "fused", *PRECISION_OPTIONS)}
                groups[i] = {**kept, **self._options_if_missing(), **group, **own}
                for name in OPTIMIZER_OPTIONS:  # These stay this optimizer's own.
                    groups[i].pop(name, None)
                self._check_group(groups[i])
                convert_to_builtin(groups[i])
        return {**state_dict, "param_groups": groups}

    def _options_if_missing(self) -> dict[str, Any]:
        """Return values for options that a checkpoint may lack and that must not keep their current value then."""
        return {}

    # Master weights.

    def load_master_weights(self, weights: MasterSource) -> None:
        """Set the parameters, and their master weights in float32, to these values: to start from a float32 checkpoint.

        Args:
            weights: tensors of any dtype and device. A mapping from parameters' names (those of the named parameters
                that the optimizer was made from), in which other names may be; an iterable with one tensor for each
                parameter, in the order of the groups; or the state dict of an optimizer that had master weights, of
                which only parameters with a master copy there are set.

        Parameters without master weights are set too.

        Raises:
            KeyError: for a name that is missing.
            ValueError: for a wrong number of tensors, and for a tensor of the wrong shape, or one that is sparse, on
                the meta device, or not of real floating-point numbers.
            RuntimeError: for names, if the optimizer does not know its parameters' names.
        """
        with self._lock, ordinary_mode():
            found = master_sources(self.param_groups, weights)
            group_of = {id(p): group for group in self.param_groups for p in group["params"]}
            for parameter, value in found:
                group = group_of[id(parameter)]
                specs = stored_state(self._declared_state(group), Precision.of(parameter, group))
                set_parameter(parameter, value, self.state[parameter] if MASTER in specs else {}, specs)

    def reset_master_weights(self) -> None:
        """Set all master weights to their parameters' values, after a program has written into the parameters.

        Without this call, the next step replaces what was written by the rounded master weights.
        """
        with self._lock, torch.no_grad():
            for parameter, state in self.state.items():
                if isinstance(state.get(MASTER.key), Tensor):
                    state[MASTER.key].copy_(parameter)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            shown = {name: group.get(name) for name in (*group, *UNSAVED_OPTIONS)}  # a plain copy may lack some
            lines += [f"    {key}: {shown[key]}" for key in sorted(shown) if key != "params"]
        return "\n".join([*lines, ")"])

    @property
    def backends(self) -> list[str]:
        """The names of the backends of all parameters that steps update so far; empty before the first step."""
        of_steps = [] if self._plan is None else self._plan.backends
        released = [] if self._release is None else self._release.backends
        return sorted({*of_steps, *released})

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @with_step_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: an optional function that computes the loss and the gradients again, and returns the loss.

        Returns:
            The return value of `closure`, or None.

        Raises:
            TypeError: for an option of the wrong type.
            ValueError: for an option out of range.
            RuntimeError: for a parameter, gradient or state that cannot be used, such as a sparse gradient, and for
                options that contradict each other.

        Gradients are never written. Everything that can be checked is checked before any parameter or state changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:
            self._release.check_step()
        self._update()
        if self._release is not None:
            self._release.end_step()
        return loss

    def _update(self) -> None:
        """Update every parameter that has a gradient."""
        with self._lock:
            self._check_changed_values()
            try:
                self._execute(self._plan_for_step())
            finally:
                if self._plan is not None:
                    self._plan.release()

    def _execute(self, plan: StepPlan) -> None:
        """Execute a plan, unless mixed precision skips the step. Everything that may fail comes before any update."""
        scaling = Scaling.from_optimizer(self)
        # Where processes exchange sums, all skip the step or none.
        if not plan.exchange and plan.updates_on_host and scaling.skips_step():
            return
        self._check_capture(plan)
        self._place_step_counts(plan, scaling)
        if plan.staged:
            plan.stage_gradients()
        hyperparameters = [self._hyperparameters(group) for group in self.param_groups]
        for launch in plan.launches:
            launch.prepare(self.param_groups, hyperparameters, scaling)
        max_grad_norm = float(self.max_grad_norm or 0)
        if plan.exchange:
            self._clipping = plan.exchange.run(scaling, max_grad_norm, self._clip_eps())
            if plan.updates_on_host and scaling.skips_step():
                return
        else:
            self._clipping = prepare_clipping(plan.launches, max_grad_norm, self._clip_eps())
        counted = self._groups_counted_on_host()
        for launch in plan.launches:
            launch.update(self._clipping, counted if launch is plan.launches[-1] else [])
        if not plan.launches:
            for group in counted:
                group["step"] += 1
        self._keep_graph_tensors(plan)
        plan.increment_versions()

    def _check_changed_values(self) -> None:
        """Check all options if any value differs from those that were last checked."""
        for i in range(len(self.param_groups)):
            self._complete_group(i)
        values = [self.max_grad_norm, *map(_values_to_check, self.param_groups)]
        if values != self._checked_values:
            if self.max_grad_norm is not None:
                check_nonnegative("max_grad_norm", self.max_grad_norm)
            for group in self.param_groups:
                self._check_group(group)
            self._checked_values = values

    def _complete_group(self, index: int) -> None:
        """Set options to their defaults that a plain copy of a group lacks; see ParameterGroup."""
        group = self.param_groups[index]
        missing = {name: self.defaults[name] for name in UNSAVED_OPTIONS if name not in group}
        if missing:
            group.update(missing)
            defaults = ", ".join(f"{name}={value!r}" for name, value in missing.items())
            self._warn_once(
                "copied", f"parameter group {index} came without options that now have their defaults: {defaults}"
            )

    def _plan_for_step(self) -> StepPlan:
        """Return a plan with this step's gradients read: the last one if nothing has changed, or else a new one."""
        options = itemgetter(*self._launch_options)
        configuration = [bool(self.max_grad_norm), self.backend, *map(options, self.param_groups)]
        plan = self._plan
        if (
            plan is not None
            and plan.configuration == configuration
            and plan.fits(self.param_groups, self.state)
            # The watch does not check the tensors of the reference backend.
            and self._reference_state_ready(plan.reference_bindings)
        ):
            return plan
        named = []
        for i, group in enumerate(self.param_groups):
            self._check_group(group)
            check_precision(f"group {i + self._origin.group}", group["params"], group)
            of_group = [(self._place(i, j), parameter) for j, parameter in enumerate(group["params"])]
            named += of_group
            if group["agr"] or self.max_grad_norm:
                needs = "agr=True" if group["agr"] else f"max_grad_norm={self.max_grad_norm}"
                for place, parameter in of_group:
                    check_whole(place, parameter, needs, ", or set agr=False and no max_grad_norm")
        if self.max_grad_norm:
            check_norm_of_all(self.max_grad_norm, named)
        self._plan = None
        bindings = bind(self, [] if plan is None else plan.bindings)
        self._warn_about_single_elements(bindings)
        self._warn_about_wrappers(bindings)
        self._warn_about_missing_kernels(bindings)
        clip = bool(self.max_grad_norm)
        parameters = [(p, bool(group["agr"])) for group in self.param_groups for p in group["params"]]
        exchange = Exchange([p for p, _ in parameters], [agr for _, agr in parameters], clip)
        plan = StepPlan(self._rule, configuration, bindings, self.param_groups, self.state, clip, exchange)
        if not plan.fits(self.param_groups, self.state) and plan.has_native_bindings:
            raise RuntimeError("parameters, gradients or state were changed by another thread during step()")
        self._plan = plan
        return plan

    def _place(self, group: int, parameter: int) -> str:
        """Return the position of a parameter in messages, with its name if it has one."""
        names = self.param_groups[group].get("param_names", ())
        named = f" ({names[parameter]!r})" if parameter < len(names) else ""
        return f"group {group + self._origin.group}, parameter {parameter + self._origin.parameter}{named}"

    def _reference_state_ready(self, bindings: Sequence[Binding]) -> bool:
        """Whether the reference backend's state needs no change; raise RuntimeError if it cannot be used."""
        present = [b for b in bindings if b.owner.grad is not None]
        for b in present:
            if b.whole is not None:
                check_distributed(b.place, b.whole, self.param_groups[b.group])
                if not has_these_parts(b.whole, self.state.get(b.whole, {}), b.parameter, b.state):
                    return False
            check_tensors(b.place, b.parameter, b.state, b.specs)
            check_writable(b.place, b.parameter, b.state)
            # A parameter whose gradient no other backend took goes back to another when its gradients are plain again.
            if Precision.of(b.owner, self.param_groups[b.group]) != b.precision:  # It has another dtype now.
                return False
            if not b.gradient.plain and b.owner.grad is not None and is_plain(b.owner.grad):
                return False
        return not any(state_change(self, b) for b in present)

    def _warn_about_single_elements(self, bindings: list[Binding]) -> None:
        places = [b.place for b in bindings if b.regularize and b.owner.numel() == 1]
        if places:
            self._warn_once(
                "single elements",
                "AGR makes the gradient of a tensor of one element exactly 0, so that it never trains: "
                f"{'; '.join(places)}. Put such parameters into a parameter group with agr=False",
            )

    def _warn_about_wrappers(self, bindings: list[Binding]) -> None:
        found = [b for b in bindings if b.backend == "reference" and self.param_groups[b.group]["fused"]]
        if found:
            self._warn_once(
                "wrappers",
                f"fused=True asks for fused kernels, and none takes a {type(found[0].owner).__name__}: the "
                f"reference backend updates {found[0].place}"
                + (f" and {len(found) - 1} others" if len(found) > 1 else ""),
            )

    def _warn_about_missing_kernels(self, bindings: list[Binding]) -> None:
        """Warn where parameters are updated by PyTorch's operations, and kernels would take them if they were there."""
        if self.backend is not None:
            return
        for b in bindings:
            group = self.param_groups[b.group]
            if b.backend == "reference" and not (group["foreach"] or group.get("differentiable")):
                missing = missing_kernels(b.parameter, b.gradient)
                if missing:
                    self._warn_once(
                        "kernels",
                        f"{b.place} is on {b.parameter.device} and no kernels are there for it, so that PyTorch's "
                        f"operations update it, many times slower: {missing}. backend='reference' asks for that "
                        "without this warning",
                    )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            warnings.warn(message, stacklevel=caller_stacklevel())
            self._warned.add(topic)

    def _check_capture(self, plan: StepPlan) -> None:
        """Raise RuntimeError if a graph is being captured while a group has capturable=False.

        Replays of such a graph would repeat the step count and the hyperparameters of the captured step.
        """
        fixed = [index for index, group in enumerate(self.param_groups) if not group["capturable"]]
        if fixed and any(launch.capturing() for launch in plan.device_launches):
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, and group {fixed[0]} has capturable=False; it must be True"
            )

    def _keep_graph_tensors(self, plan: StepPlan) -> None:
        """Keep the tensors of captured launches for as long as the optimizer lives: their graphs may be replayed."""
        for launch in plan.device_launches:
            if launch.newly_captured:
                launch.newly_captured = False
                counts = [group["step"] for group in self.param_groups if isinstance(group.get("step"), Tensor)]
                for tensor in (*counts, *launch.graph_tensors()):
                    self._graph_tensors[id(tensor)] = tensor
