"""Gradient release: update each parameter as soon as its gradient is there, and free the gradient.

AGR needs the abs-sum of one tensor, no more, so that the updates are those of an ordinary step. A step of the whole
optimizer is one launch, and this is one for each parameter: memory is bought with the host's time. Every parameter has
an optimizer of its own for that, which works with the program's groups and state.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from .groups import converts_state
from .optimizer import AGROptimizer, Origin
from .options import number
from .precision import Precision
from .sharding import check_whole
from .tensors import is_distributed


def release_gradients(
    model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]], optimizer: AGROptimizer
) -> GradientRelease:
    """Update each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

    Gradients then take the memory of the largest one, and not of all. The updates are those of ordinary steps. Call
    `optimizer.step()` after each backward pass as before: it ends the step, so that schedulers and Adan count it, and
    updates what else has a gradient (parameters that `model` has not, or that were frozen when this function was
    called):

        optimizer = agr_cuda.AdamW(model.parameters(), lr=1e-3)
        agr_cuda.release_gradients(model, optimizer)
        for inputs, targets in batches:
            loss_function(model(inputs), targets).backward()  # updates the parameters
            optimizer.step()
            scheduler.step()

    Learning rates and other options are read when the gradient arrives. Hooks that were registered on a parameter
    before (`register_post_accumulate_grad_hook`) see its gradient, later ones find None, and so does everything after
    `backward()`, such as torch.nn.utils.clip_grad_norm_. Copies and pickles of the optimizer do not release.

    Where an ordinary program updates in `step()`, this one does in every `backward()`:

    - One that is not meant for all parameters (a generator's loss that goes through the discriminator) updates those
      too, unless they require no gradient at that time.
    - After an error in `backward()`, some parameters have been updated. Call `zero_grad()` and `step()` to go on.
    - The backward pass must not read a parameter after its gradient is complete. PyTorch raises an error where
      `weight.detach()` is in the same graph, and sees nothing where `weight.data` is.

    It takes a launch and about 0.1 ms of the host's time for each tensor.

    It cannot be had together with:

    - `max_grad_norm`: the norm of all gradients is known when the last one is there, and by then most are gone.
    - torch.amp.GradScaler: whether there were infinities is known after the updates. bfloat16 needs no scaler.
    - accumulation: the first of several gradients is used up before the second comes. So it is with reentrant
      checkpointing (torch.utils.checkpoint) of several segments that share a weight.
    - DistributedDataParallel and sharded parameters: gradients are summed over processes after they have arrived, and
      each abs-sum would be an all-reduce of its own.
    - `capturable=True` and `differentiable=True`: the steps of all tensors are counted together on the device; the
      graph of a differentiable step would refer to gradients that are gone.

    Args:
        model: the model, or its parameters, named or not. Those that the optimizer does not have are left alone.
        optimizer: an `agr_cuda.AdamW` or `agr_cuda.Adan`.

    Returns:
        A handle, whose `remove()` ends the release; as a context manager it does so at the end of the block.

    Raises:
        TypeError: for another optimizer, and for a model that is neither a module nor an iterable of tensors.
        ValueError: if the optimizer has none of the parameters that require a gradient, and for a parameter that is not
            initialized yet.
        RuntimeError: for what is listed above, where it can be seen from the model and the optimizer; if gradients of
            this optimizer are released already; and later, by `backward()`, if a parameter gets a second gradient
            before `step()`, or one that the optimizer cannot use; by `step()`, if something has written a gradient
            after it was released; and by `GradScaler.step()`.
    """
    if not isinstance(optimizer, AGROptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be agr_cuda.AdamW or agr_cuda.Adan")
    if optimizer._release is not None:
        raise RuntimeError("gradients of this optimizer are released already: call remove() on the handle first")
    _check_norm(optimizer)
    for i in range(len(optimizer.param_groups)):
        _check_group(optimizer, i)
    parameters = _parameters_of(model)
    wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
    all_places = [(i, j, p) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])]
    places = [(Origin(i, j, index), p) for index, (i, j, p) in enumerate(all_places) if id(p) in wanted]
    if not places:
        raise ValueError("the optimizer has no parameter of the model that requires a gradient")
    for origin, parameter in places:
        place = optimizer._place(origin.group, origin.parameter)
        if is_lazy(parameter):
            raise ValueError(f"{place} has no shape yet; run the model once, so that lazy modules are initialized")
        check_whole(place, parameter, "release_gradients")
        if is_distributed(parameter):
            raise RuntimeError(
                f"{place} is a DTensor, whose gradient is summed over processes, and each abs-sum would be an "
                "all-reduce of its own: gradients of sharded parameters cannot be released"
            )
    return GradientRelease(optimizer, places)


def _parameters_of(model: Any) -> list[Tensor]:
    if isinstance(model, nn.Module):
        if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
            raise RuntimeError(
                "model has a DistributedDataParallel, which sums gradients over processes after they have arrived, "
                "when they would be released already"
            )
        return list(model.parameters())
    parameters = []
    for item in [model] if isinstance(model, Tensor) else model:
        parameter = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if not isinstance(parameter, Tensor):
            raise TypeError(f"model has a {type(parameter).__name__}; it must be a module or an iterable of tensors")
        parameters.append(parameter)
    return parameters


def _check_norm(optimizer: AGROptimizer) -> None:
    """Raise RuntimeError for a clipping optimizer."""
    if optimizer.max_grad_norm:
        raise RuntimeError(
            f"max_grad_norm is {optimizer.max_grad_norm}, and the norm of all gradients is known only when the last "
            "one is there, after the first ones have been released: max_grad_norm=None"
        )


def _check_group(optimizer: AGROptimizer, index: int) -> None:
    """Raise RuntimeError for options of a group that exclude gradient release."""
    group = optimizer.param_groups[index]
    for option in ("capturable", "differentiable"):
        if group.get(option):
            raise RuntimeError(f"{option} is True in group {index}, and gradients are released: {option}=False")


class GradientRelease:
    """The handle that `release_gradients` returns."""

    def __init__(self, optimizer: AGROptimizer, places: Sequence[tuple[Origin, Tensor]]) -> None:
        self._optimizer = optimizer
        self._updated: set[int] = set()  # the id() of each parameter that has been updated since the last step()
        self._singles = {id(parameter): _Single(optimizer, origin) for origin, parameter in places}
        # A hook that kept this object alive would keep the parameters alive, and they the hook.
        this = weakref.ref(self)

        def hook(identity: int, _: Tensor) -> None:
            release = this()
            if release is not None:
                release._take_gradient(identity)

        # As step() is: a compiled function that calls backward() breaks its graph there.
        disable: Any = torch.compiler.disable
        hook = disable(hook)
        self._hooks: list[RemovableHandle] = []
        for _, parameter in places:
            register: Any = parameter.register_post_accumulate_grad_hook
            self._hooks.append(register(partial(hook, id(parameter))))
        # torch.amp.GradScaler then hands its numbers to step(), which refuses them with the reason.
        self._scaling_supported = getattr(optimizer, "_step_supports_amp_scaling", None)
        optimizer._step_supports_amp_scaling = True
        optimizer._release = self

    def remove(self) -> None:
        """End the release: from now on, gradients stay until `step()` and `zero_grad()`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._optimizer._release is self:
            self._optimizer._release = None
            if self._scaling_supported is None:
                del self._optimizer._step_supports_amp_scaling

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def backends(self) -> list[str]:
        """The names of the backends that have updated parameters."""
        return sorted({name for single in self._singles.values() for name in single.backends})

    def _take_gradient(self, identity: int) -> None:
        """Update a parameter, given by its id(), whose gradient is complete, and free the gradient."""
        single = self._singles[identity]
        if single.parameter.grad is None:  # an earlier hook has taken it
            return
        if identity in self._updated:
            raise RuntimeError(
                f"{single.place()} has a second gradient since the last step(), and the first has been used and "
                "released: gradients cannot be accumulated. Call step() after every backward(); after this error, "
                "zero_grad() and step()"
            )
        _check_norm(self._optimizer)
        single.update()
        self._updated.add(identity)
        single.parameter.grad = None

    def check_step(self) -> None:
        """Raise RuntimeError if the optimizer's step() cannot end a step whose gradients were released."""
        _check_norm(self._optimizer)
        for i in range(len(self._optimizer.param_groups)):
            _check_group(self._optimizer, i)
        for identity in self._updated:
            single = self._singles[identity]
            if single.parameter.grad is not None:
                raise RuntimeError(
                    f"{single.place()} has a gradient again, after its gradient has been used and released: by "
                    "DistributedDataParallel, which writes the sum over all processes afterwards, or by accumulation. "
                    "Neither can be had with released gradients"
                )
        for name in ("grad_scale", "found_inf"):
            if getattr(self._optimizer, name, None) is not None:
                raise RuntimeError(
                    f"a gradient scaler has set {name}, and parameters were updated before it could look for infinities"
                    " in their gradients: gradients of scaled losses cannot be released. bfloat16 needs no scaler"
                )

    def end_step(self) -> None:
        """Begin the next step, in which every parameter may have a gradient again."""
        self._updated.clear()


class _Single:
    """An optimizer of one parameter, with the options and the state of the program's optimizer."""

    def __init__(self, optimizer: AGROptimizer, origin: Origin) -> None:
        self._whole = weakref.ref(optimizer)
        self._origin = origin
        theirs = optimizer.param_groups[origin.group]
        self.parameter: Tensor = theirs["params"][origin.parameter]
        self._fixed: dict[str, Any] = {"params": [self.parameter]}
        if "param_names" in theirs:
            self._fixed["param_names"] = [theirs["param_names"][origin.parameter]]
        self._optimizer = copy.copy(optimizer)
        for name, value in vars(optimizer).items():  # what a subclass has set
            vars(self._optimizer).setdefault(name, value)
        self._optimizer.param_groups = [theirs.copy()]
        self._optimizer.state = defaultdict(dict)
        self._optimizer._warned = optimizer._warned
        self._optimizer._origin = origin

    def place(self) -> str:
        """Return the parameter's position in messages."""
        return self._optimizer._place(0, 0)

    @property
    def backends(self) -> list[str]:
        """The name of the backend that has updated the parameter, if one has."""
        return self._optimizer.backends

    def update(self) -> None:
        """Update the parameter."""
        optimizer = self._whole()
        assert optimizer is not None
        parameter, index = self.parameter, self._origin.group
        of_group = optimizer.param_groups[index]["params"] if index < len(optimizer.param_groups) else []
        if all(p is not parameter for p in of_group[self._origin.parameter :][:1]):
            raise RuntimeError(
                f"{self.place()} is no longer there in the optimizer, and its gradient is to be released: call remove()"
                " on the handle before groups are changed"
            )
        _check_group(optimizer, index)
        optimizer._complete_group(index)
        theirs = optimizer.param_groups[index]
        if isinstance(theirs.get("step"), Tensor):  # a count on a GPU, left by mixed precision or capturable=True
            theirs["step"] = int(number(theirs["step"]))
        mine = self._optimizer.param_groups[0]
        mine.update(dict.items(theirs))
        mine.update(self._fixed)
        # What a group asks for applies to some of its parameters; a group of one other alone would be an error.
        precision = Precision.of(parameter, theirs)
        mine.update(master_weights=precision.master, stochastic_rounding=precision.stochastic)
        converts_state(theirs)
        if self._optimizer.state.get(parameter) is not optimizer.state.get(parameter):
            self._optimizer.state.clear()
            if parameter in optimizer.state:
                self._optimizer.state[parameter] = optimizer.state[parameter]
        self._optimizer._update()
        optimizer.state[parameter] = self._optimizer.state[parameter]
