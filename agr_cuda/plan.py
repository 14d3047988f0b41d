"""The plan of a step, which is reused until something changes: bindings, their launches, and a watch for changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .cpu import CpuLaunch
from .cuda import CudaLaunch
from .launch import DeviceLaunch, Launch
from .native import native
from .reference import ReferenceLaunch
from .sharding import Exchange, inner_name, read_gradients
from .tensors import Binding, ordinary_mode
from .triton import TritonLaunch

#: The launch class of each GPU backend.
DEVICE_LAUNCH_CLASSES: dict[str, Callable[..., DeviceLaunch]] = {"cuda": CudaLaunch, "triton": TritonLaunch}


class StepPlan:
    """The launches of a step for given bindings, and the watch that detects when they no longer fit.

    A plan fits whichever of its parameters have gradients: a launch skips those that have none.
    """

    def __init__(
        self,
        rule: str,
        configuration: list[Any],
        bindings: list[Binding],
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        clip: bool,
        exchange: Exchange,
    ) -> None:
        #: The values of the options for which the launches were made.
        self.configuration = configuration
        self.bindings = bindings
        #: The sums over processes; it is false where there are none.
        self.exchange = exchange
        apart = clip or bool(exchange)  # whether all gradients are reduced before the first update
        self.reference_bindings = [b for b in bindings if b.backend == "reference"]
        #: The bindings whose gradient has another memory layout than the parameter.
        self.staged = [b for b in bindings if b.staged is not None]
        reference = [ReferenceLaunch(rule, self.reference_bindings)] if self.reference_bindings else []
        #: The launches on GPUs: one for each combination of dtypes on each device.
        sizes = [parameter.numel() for group in groups for parameter in group["params"]]
        self.device_launches = device_launches(DEVICE_LAUNCH_CLASSES, rule, bindings, len(groups), sizes, apart)
        on_cpu = [b for b in bindings if b.backend == "cpu"]
        cpu = [CpuLaunch(rule, on_cpu, apart)] if on_cpu else []
        #: All launches, in the order of a step. The last one counts the step; a native launch does so in the same call
        #: as the update, so that no signal handler can run in between.
        self.launches: list[Launch] = [*reference, *self.device_launches, *cpu]
        if exchange:
            exchange.attach(self.launches)
        #: Whether a part of the step runs on the host, which then has to know whether mixed precision skips the step.
        self.updates_on_host = bool(reference or cpu or not self.device_launches)
        self._second_owners = _second_owners(bindings)
        self._watch = None
        if backends.why_missing("cpu") is None:
            self._watch = native().Watch(groups, state)
            for binding in self.reference_bindings:
                self._watch.add_by_reference(binding.index)
            for launch in (*self.device_launches, *cpu):
                self._watch_launch(launch.bindings, launch.gradients)

    def _watch_launch(self, bindings: Sequence[Binding], gradients: Any) -> None:
        """Have the watch check a launch's tensors and write its gradients' addresses into the table `gradients`."""
        assert self._watch is not None
        for slot, b in enumerate(bindings):
            keys = [spec.key for spec in b.specs]
            inner = None if b.whole is None else inner_name(b.whole)
            whole: Any = b.whole
            placements = None if whole is None or b.gradient.moved else whole.placements
            of_gradient = b.gradient.class_, str(b.gradient.dtype)
            self._watch.add(b.index, keys, gradients, slot, *of_gradient, b.staged, inner, placements)

    @property
    def has_native_bindings(self) -> bool:
        """Whether any parameter is updated by native or Triton kernels."""
        return len(self.reference_bindings) < len(self.bindings)

    @property
    def backends(self) -> list[str]:
        """The names of the backends used, sorted."""
        return sorted({binding.backend for binding in self.bindings})

    def fits(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether nothing has changed. If so, this step's gradients have been read, and stay alive until `release`."""
        return self._watch is not None and bool(self._watch.unchanged(groups, state))

    @torch.no_grad()
    def stage_gradients(self) -> None:
        """Copy gradients whose memory layout differs from the parameter's into the staging buffers."""
        for binding, gradient in zip(self.staged, read_gradients(self.staged), strict=True):
            if gradient is not None:
                assert binding.staged is not None
                binding.staged.copy_(gradient)

    def increment_versions(self) -> None:
        """Increment the version counter of every parameter that kernels wrote, as PyTorch's in-place operations do.

        Autograd then detects a backward pass that needs the overwritten values.
        """
        if self._watch is not None:
            torch.autograd.graph.increment_version(self._watch.updated)

    def release(self) -> None:
        """Drop the references to this step's gradients."""
        if self._watch is not None:
            self._watch.release()


def _second_owners(bindings: Sequence[Binding]) -> list[Tensor]:
    """Return a view of every state tensor that kernels use, which makes it cheaper to read where the tensor is.

    In PyTorch 2.13, when C code reads a tensor that has a single owner, ownership of its Python object passes from
    Python to C++ and back, which takes twice as long as the read itself. A view of the tensor is a second owner and
    avoids that. Parameters get no view: if a parameter refers to the optimizer, the garbage collector could free
    neither of them. The views give up their memory, so that a program that moves a state tensor elsewhere frees it.
    """
    views = []
    with ordinary_mode():
        for b in bindings:
            for tensor in b.state_tensors if b.backend != "reference" else ():
                if not tensor.is_inference():
                    views.append(tensor.view_as(tensor))
                    views[-1].data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return views


def device_launches(
    classes: Mapping[str, Callable[..., DeviceLaunch]],
    rule: str,
    bindings: Sequence[Binding],
    groups: int,
    sizes: Sequence[int],
    clip: bool,
) -> list[DeviceLaunch]:
    """Return a launch for each GPU backend, device and combination of dtypes among the bindings.

    Args:
        classes: the launch class of each GPU backend.
        rule: the update rule's name in the native core.
        bindings: the bindings, of all backends.
        groups: the number of parameter groups.
        sizes: the numbers of elements of all parameters, bound or not, by their indices.
        clip: whether all gradients are reduced before the first update, as for clipping by the global norm.
    """
    by_types = defaultdict(list)
    for b in bindings:
        if b.backend in classes:
            by_types[b.backend, b.parameter.device, b.types].append(b)
    # This order does not depend on which parameters have gradients, so the partial norms are always added up in it.
    keys = sorted(by_types, key=str)
    # The last launch on each device increments the groups' step counts there.
    last_key = {key[1]: key for key in keys}
    with ordinary_mode():
        return [
            classes[key[0]](rule, by_types[key], groups, sizes, clip, counts=last_key[key[1]] == key) for key in keys
        ]
