"""What a step needs that stays the same until something moves: checked bindings, launches, and the watch over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import choose, why_not
from .binding import Binding, is_plain, is_wrapper, made_for_later
from .cpu import CpuLaunch
from .cuda import CudaLaunch
from .launch import DeviceLaunch
from .native import native
from .reference import ReferenceLaunch
from .state import why_fixed
from .triton import TritonLaunch

#: By backend.
LAUNCHES: dict[str, Callable[..., DeviceLaunch]] = {"cuda": CudaLaunch, "triton": TritonLaunch}


class Schedule:
    """The launches of a step for these bindings, and the watch that notices when they no longer fit."""

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
        self.referred = [b for b in bindings if b.backend == "reference"]
        on_cpu = [b for b in bindings if b.backend == "cpu"]
        together = defaultdict(list)
        for b in bindings:
            if b.backend in LAUNCHES:
                together[b.backend, b.parameter.device, b.parameter.dtype, b.gradient.dtype].append(b)
        #: Bindings whose gradient has another memory layout than the parameter.
        self.relaid = [b for b in bindings if b.relaid is not None]
        #: Parameters that are written without PyTorch's knowledge.
        self.written = [b.parameter for b in bindings if b.backend != "reference"]
        self.reference = ReferenceLaunch(rule, self.referred) if self.referred else None
        self.cpu = CpuLaunch(rule, on_cpu, clip) if on_cpu else None
        # The last one on a device raises the step counts that groups have there.
        last = {key[1]: key for key in together}
        #: Of GPUs: one for each combination of types on each.
        with made_for_later():
            self.launches = [
                LAUNCHES[key[0]](rule, of_launch, len(groups), clip, counts=last[key[1]] == key)
                for key, of_launch in together.items()
            ]
        self._watch = None
        if backends.why_missing("cpu") is None:
            self._watch = native().Watch(groups, state)
            for binding in self.referred:
                self._watch.add_untabled(binding.index)
            if self.cpu is not None:
                self._look_after(on_cpu, self.cpu.gradients)
            for launch in self.launches:
                self._look_after(launch.bindings, launch.gradients)

    def _look_after(self, bindings: Sequence[Binding], gradients: Any) -> None:
        """Watch what a launch was made for, and read its gradients' addresses into its table."""
        assert self._watch is not None
        for slot, binding in enumerate(bindings):
            keys = [*binding.keys, "step"] if "step" in binding.state else [*binding.keys]
            self._watch.add(binding.index, keys, gradients, slot, binding.relaid)

    @property
    def on_host(self) -> bool:
        """Whether the host has to know the numbers of a step: not all of it happens in launches on GPUs."""
        return not self.launches or self.cpu is not None or self.reference is not None

    @property
    def backends(self) -> list[str]:
        """The names of the backends used."""
        return sorted({binding.backend for binding in self.bindings})

    def fits(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether nothing has moved. If so, this step's gradients are read and stay alive until `release`."""
        return self._watch is not None and self._watch.unchanged(groups, state)

    def count_changes(self) -> None:
        """Count a change of what was written, as PyTorch's operations in place do.

        So autograd notices a backward pass that comes too late.
        """
        if self.written and not (self._watch is not None and self._watch.count_changes()):
            torch.autograd.graph.increment_version(self.written)

    def release(self) -> None:
        """Let go of this step's gradients."""
        if self._watch is not None:
            self._watch.release()


def check_tensors(place: str, parameter: Tensor, state: dict[str, Any], keys: Iterable[str]) -> None:
    """Raise RuntimeError unless the gradient and the state of `parameter` fit it. Changes nothing."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise RuntimeError(f"the gradient of {place} is {gradient.layout}; it must be dense (torch.strided)")
    wanted = tuple(parameter.shape)
    strides = zip(wanted, parameter.stride(), strict=True)
    if parameter.numel() > 0 and any(size > 1 and stride == 0 for size, stride in strides):
        raise RuntimeError(f"{place} is expanded: its elements share memory, so that they cannot be updated")
    if gradient.shape != parameter.shape:
        raise RuntimeError(f"the gradient of {place} has shape {tuple(gradient.shape)}; it must be {wanted}")
    if gradient.device != parameter.device:
        raise RuntimeError(f"the gradient of {place} is on {gradient.device}; it must be on {parameter.device}")
    for key in keys:
        value = state.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise RuntimeError(f"{key} of {place} is a {type(value).__name__}; it must be a tensor")
        if value.shape != parameter.shape:
            raise RuntimeError(f"{key} of {place} has shape {tuple(value.shape)}; it must be {wanted}")
        if value.device != parameter.device:
            raise RuntimeError(f"{key} of {place} is on {value.device}; it must be on {parameter.device}")
    step = state.get("step")
    if isinstance(step, Tensor) and step.numel() != 1:
        raise RuntimeError(f"step of {place} has shape {tuple(step.shape)}; it must have 1 element")


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
    place: str, group: dict[str, Any], parameter: Tensor, states: dict[str, Tensor], asked: str | None
) -> str:
    """Return the backend that updates `parameter`, or raise RuntimeError if that is not the one `asked` for."""
    gradient = parameter.grad
    backend = asked
    if backend is None:
        wants_reference = group["foreach"] or group.get("differentiable")
        backend = "reference" if wants_reference else choose(parameter, gradient)
    reason = why_not(backend, parameter, gradient)
    if reason is None and backend != "reference":
        other = next((s for s in states.values() if s.dtype != parameter.dtype or not is_plain(s)), None)
        if other is not None:
            reason = f"its state is a {other.dtype} {type(other).__name__}, the parameter {parameter.dtype}"
        else:
            reason = why_fixed(parameter, states)
        if reason is not None:
            backend = "reference"
    if asked is not None and reason is not None:
        raise RuntimeError(f"backend={asked!r} does not take {place}: {reason}")
    # What fused=True asks for, of a DTensor, is a step: nothing else takes it.
    if group["fused"] and backend == "reference" and not is_wrapper(parameter):
        others = [name for name in backends.available_backends() if name != "reference"]
        reasons = [reason] if reason else [why_not(name, parameter, gradient) for name in others]
        because = "; ".join(r for r in reasons if r) or "no other backend is there"
        raise RuntimeError(f"fused=True refuses the reference backend, which alone takes {place}: {because}")
    return backend
