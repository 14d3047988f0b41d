"""What a step needs that stays the same until something moves: bindings, their launches, and the watch over both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .cpu import CpuLaunch
from .cuda import CudaLaunch
from .launch import DeviceLaunch, Launch
from .native import native
from .reference import ReferenceLaunch
from .tensors import Binding, made_for_later
from .triton import TritonLaunch

#: By backend.
DEVICE_LAUNCHES: dict[str, Callable[..., DeviceLaunch]] = {"cuda": CudaLaunch, "triton": TritonLaunch}


class StepPlan:
    """The launches of a step for these bindings, and the watch that notices when they no longer fit.

    A plan fits whichever of its parameters have gradients; a launch passes over those that have none.
    """

    def __init__(
        self,
        rule: str,
        structure: list[Any],
        bindings: list[Binding],
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        clip: bool,
    ) -> None:
        #: What of the options the launches were made for.
        self.structure = structure
        self.bindings = bindings
        self.by_reference = [b for b in bindings if b.backend == "reference"]
        #: Bindings whose gradient has another memory layout than the parameter.
        self.staged = [b for b in bindings if b.staged is not None]
        reference = [ReferenceLaunch(rule, self.by_reference)] if self.by_reference else []
        #: Of GPUs: one for each combination of types on each.
        self.on_devices = _device_launches(rule, bindings, groups, clip)
        on_cpu = [b for b in bindings if b.backend == "cpu"]
        cpu = [CpuLaunch(rule, on_cpu, clip)] if on_cpu else []
        #: In the order of a step. The last one counts the step; a native one does so before a signal handler can run.
        self.launches: list[Launch] = [*reference, *self.on_devices, *cpu]
        #: Whether the host has to know the numbers of a step: not all of it happens in launches on GPUs.
        self.on_host = bool(reference or cpu or not self.on_devices)
        self._second_owners = _second_owners(bindings)
        self._watch = None
        if backends.why_missing("cpu") is None:
            self._watch = native().Watch(groups, state)
            for binding in self.by_reference:
                self._watch.add_by_reference(binding.index)
            for launch in (*self.on_devices, *cpu):
                self._look_after(launch.bindings, launch.gradients)

    def _look_after(self, bindings: Sequence[Binding], gradients: Any) -> None:
        """Watch what a launch was made for, and read its gradients' addresses into its table."""
        assert self._watch is not None
        for slot, b in enumerate(bindings):
            keys = [spec.key for spec in b.states]
            self._watch.add(b.index, keys, gradients, slot, b.gradient.class_, str(b.gradient.dtype), b.staged)

    @property
    def written(self) -> bool:
        """Whether native launches write any tensor."""
        return len(self.by_reference) < len(self.bindings)

    @property
    def backends(self) -> list[str]:
        """The names of the backends used."""
        return sorted({binding.backend for binding in self.bindings})

    def fits(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether nothing has moved. If so, this step's gradients are read and stay alive until `release`."""
        return self._watch is not None and bool(self._watch.unchanged(groups, state))

    @torch.no_grad()
    def stage_gradients(self) -> None:
        """Copy gradients of another memory layout to where launches read them."""
        for binding in self.staged:
            if binding.parameter.grad is not None:
                assert binding.staged is not None
                binding.staged.copy_(binding.parameter.grad)

    def count_changes(self) -> None:
        """Count a change of every parameter that launches wrote, as PyTorch's operations in place do.

        So autograd notices a backward pass that comes too late.
        """
        if self._watch is not None:
            torch.autograd.graph.increment_version(self._watch.updated)

    def release(self) -> None:
        """Let go of this step's gradients."""
        if self._watch is not None:
            self._watch.release()


def _second_owners(bindings: Sequence[Binding]) -> list[Tensor]:
    """Return a view of every state tensor that native launches use, which makes it cheaper to look at.

    PyTorch 2.13 hands the Python object of a tensor with one owner from Python to C++ and back whenever C code looks at
    the tensor, which takes twice as long as the look. With a view, a tensor has two owners. Parameters get none: the
    garbage collector could not free one that refers to the optimizer.
    """
    native_bindings = [b for b in bindings if b.backend != "reference"]
    with made_for_later():
        return [x.view_as(x) for b in native_bindings for x in (*b.averages, b.count) if x is not None]


def _device_launches(
    rule: str, bindings: Sequence[Binding], groups: list[dict[str, Any]], clip: bool
) -> list[DeviceLaunch]:
    together = defaultdict(list)
    for b in bindings:
        if b.backend in DEVICE_LAUNCHES:
            together[b.backend, b.parameter.device, b.parameter.dtype, b.gradient.dtype].append(b)
    # In an order that does not depend on which parameters have gradients, so that norms are added up in one.
    keys = sorted(together, key=str)
    # The last one on a device raises the step counts that groups have there.
    last = {key[1]: key for key in keys}
    sizes = [parameter.numel() for group in groups for parameter in group["params"]]
    with made_for_later():
        return [
            DEVICE_LAUNCHES[key[0]](rule, together[key], len(groups), sizes, clip, counts=last[key[1]] == key)
            for key in keys
        ]
