"""The plan of regularize_gradients_ for one list of parameters: bindings of gradients, their launches, and a watch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import backends
from .clipping import Clipping, clip_by_norm
from .cpu import CpuLaunch
from .cuda import CudaLaunch
from .launch import DeviceLaunch, Launch, capturing_on
from .native import native
from .plan import device_launches
from .precision import Precision
from .reference import ReferenceGradientLaunch
from .scaling import Scaling
from .sharding import check_whole
from .state import check_no_overlap
from .tensors import Binding, GradientKind, is_dense, is_plain, ordinary_mode
from .triton_gradients import TritonGradientLaunch

#: The launch class of each GPU backend.
DEVICE_LAUNCH_CLASSES: dict[str, Callable[..., DeviceLaunch]] = {"cuda": CudaLaunch, "triton": TritonGradientLaunch}

#: The rule's name in the native core, and the hyperparameters of its only group: the sign of the gradients.
RULE, HYPERPARAMETERS = "regularize", [(1.0,)]

#: The number that clipping adds to the norm: that of torch.nn.utils.clip_grad_norm_.
CLIP_EPS = 1e-6


class GradientPlan:
    """The launches that regularize the gradients of a list of parameters, in place, and the watch over the gradients.

    It depends on the gradients' sizes, types and devices, and holds neither parameters nor gradients. It fits whichever
    of the gradients that it was made for are there.
    """

    def __init__(
        self, parameters: list[Tensor], clip: bool, requested: str | None, previous: GradientPlan | None
    ) -> None:
        """Check all gradients, and make the launches.

        Args:
            parameters: the parameters.
            clip: whether to clip by the global norm.
            requested: the backend asked for, or None to choose one for each gradient.
            previous: the last plan for these parameters. What it has of gradients that are missing now is taken over,
                so that one plan comes to fit all sets of gradients.

        Raises:
            RuntimeError: for a gradient that cannot be changed in place, or that `requested` does not take, and if
                launches are needed while a graph is captured.
        """
        #: Held from the reading of gradients to the end of the launches.
        self.lock = threading.RLock()
        #: Whether a captured graph uses the launches' memory, so that no other call may.
        self.captured = False
        self._clip, self._requested = clip, requested
        gradients = [parameter.grad for parameter in parameters]
        found = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
        for i, gradient in found:
            check_gradient(i, gradient)
            check_whole(f"parameter {i}", parameters[i], "regularize_gradients_")
        first_of: dict[int, int] = {}  # by the gradient's id()
        shared = [(i, first) for i, g in found if (first := first_of.setdefault(id(g), i)) != i]
        found = [(i, gradient) for i, gradient in found if first_of[id(gradient)] == i]
        chosen = {i: choose(i, gradient, requested) for i, gradient in found}
        dense = [(g, "", f"the gradient of parameter {i}") for i, g in found if is_plain(g) and is_dense(g)]
        check_no_overlap(dense)
        new = {i: gradient for i, gradient in found if chosen[i] != "reference"}
        if any(capturing_on(device) for device in {gradient.device for gradient in new.values()}):
            raise RuntimeError(
                "regularize_gradients_ is being captured in a graph, and needs memory that it cannot prepare during a "
                "capture: call it once before, outside of the capture, with the same parameters and options"
            )
        bound = _bindings(new, chosen)
        if previous is not None:
            bound |= {b.index: b for b in previous._bindings if gradients[b.index] is None}
        self._bindings: list[Binding] = [bound[i] for i in sorted(bound)]
        bound_sizes = {b.index: b.parameter.numel() for b in self._bindings}
        sizes = [bound_sizes.get(i, parameter.numel()) for i, parameter in enumerate(parameters)]
        self._reference = ReferenceGradientLaunch()
        self._device_launches = device_launches(DEVICE_LAUNCH_CLASSES, RULE, self._bindings, 1, sizes, clip)
        on_cpu = [b for b in self._bindings if b.backend == "cpu"]
        cpu = [CpuLaunch(RULE, on_cpu, clip)] if on_cpu else []
        self._native_launches: list[Launch] = [*self._device_launches, *cpu]
        self._on_cpu = bool(on_cpu)
        #: The number of gradients that launches work on.
        self.tensors = len(self._bindings)
        #: The memory that launches occupy on GPUs.
        self.device_bytes = sum(tensor.nbytes for launch in self._device_launches for tensor in launch.buffers())
        #: The parameters whose gradients are regularized by PyTorch's operations, by their indices.
        chosen |= {i: chosen[first] for i, first in shared}
        self._by_reference: list[int] = [i for i, backend in chosen.items() if backend == "reference"]
        if previous is not None:
            self._by_reference += [i for i in previous._by_reference if gradients[i] is None]
        self._watch: Any = None
        if backends.why_missing("cpu") is not None:  # without the native core there is nothing but operations
            self._by_reference = list(range(len(parameters)))
            return
        self._watch = native().GradientWatch(len(parameters))
        for launch in self._native_launches:
            for slot, b in enumerate(launch.bindings):
                if b.index in new:
                    self._watch.add(b.index, launch.gradients, slot, new[b.index])
                else:
                    assert previous is not None
                    self._watch.add_as_in(previous._watch, b.index, launch.gradients, slot)
        for i in self._by_reference:
            self._watch.add_by_reference(i)
        for i, first in shared:
            if chosen[first] != "reference":
                self._watch.add_shared(i, first)

    def capturing(self) -> bool:
        """Whether launches would now be captured into a graph."""
        return any(launch.capturing() for launch in self._device_launches)

    def read(self, parameters: list[Tensor]) -> list[Tensor] | None:
        """Read this call's gradients. The lock must be held from here on, until `run` returns.

        Returns:
            The gradients that native launches work on, or None if the plan no longer fits.

        Raises:
            RuntimeError: for a gradient that cannot be changed in place, or that the backend asked for does not take.
        """
        found: list[Tensor] | None = [] if self._watch is None else self._watch.read(parameters)
        if found is None or not self._by_reference:
            return found
        given: dict[int, Tensor] = {}
        for i in self._by_reference:
            gradient = parameters[i].grad
            if gradient is not None:
                check_gradient(i, gradient)
                if choose(i, gradient, self._requested) != "reference":
                    return None
                given[id(gradient)] = gradient
        together = [(g, "", "") for g in (*found, *given.values()) if is_plain(g) and is_dense(g)]
        try:
            check_no_overlap(together)
        except RuntimeError:
            return None  # A new plan raises the error with the parameters' names.
        self._reference.given = list(given.values())
        return found

    def run(self, gradients: list[Tensor], max_norm: float, scaling: Scaling) -> Tensor | float:
        """Regularize what `read` has found, and return the norm of all gradients, or 0 without clipping.

        Args:
            gradients: what `read` returned.
            max_norm: the largest norm, which is used if the plan clips.
            scaling: the gradient scale and the overflow flag.
        """
        given = self._reference.given
        if not gradients and not given:
            return 0.0
        try:
            if self._on_cpu and scaling.skips_step():
                return torch.full((), torch.nan, dtype=torch.float64, device="cpu")
            launches = [*([self._reference] if given else []), *self._native_launches]
            for launch in launches:
                launch.prepare([], HYPERPARAMETERS, scaling)
            clipping = clip_by_norm(launches, max_norm, CLIP_EPS) if self._clip else Clipping()
            for launch in launches:
                launch.update(clipping, ())
        finally:
            self._reference.given = ()
        torch.autograd.graph.increment_version(gradients)
        norm = clipping.measured_norm()
        return 0.0 if norm is None else norm


def check_gradient(index: int, gradient: Tensor) -> None:
    """Raise RuntimeError if the gradient of the parameter at `index` cannot be changed in place."""
    place = f"the gradient of parameter {index}"
    if gradient.layout != torch.strided:
        raise RuntimeError(f"{place} is {gradient.layout}; it must be dense (torch.strided)")
    strides = zip(gradient.shape, gradient.stride(), strict=True)
    if gradient.numel() > 0 and any(size > 1 and stride == 0 for size, stride in strides):
        raise RuntimeError(f"{place} is expanded: its elements share memory, so that they cannot be changed")


def choose(index: int, gradient: Tensor, requested: str | None) -> str:
    """Return the backend that regularizes a gradient.

    Raises:
        RuntimeError: if the requested backend does not take it.
    """
    backend = requested or backends.choose(gradient)
    reason = backends.why_not(backend, gradient)
    if reason is not None and requested is not None:
        raise RuntimeError(f"backend={requested!r} does not take the gradient of parameter {index}: {reason}")
    backend = "reference" if reason is not None else backend
    if backend == "reference" and gradient.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"the reference backend cannot change the gradient of parameter {index} outside of torch.inference_mode(): "
            "it was made within"
        )
    return backend


def _bindings(gradients: Mapping[int, Tensor], chosen: Mapping[int, str]) -> dict[int, Binding]:
    """Return bindings that stand for gradients of these sizes, types and devices, all by their parameters' indices.

    Executors take the gradient's address of each call for the parameter's too. A binding's parameter is there for its
    size, type and device: of all its elements, and those of the others, one is in memory.
    """
    element: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    bindings = {}
    with ordinary_mode():
        for i, g in gradients.items():
            if (g.dtype, g.device) not in element:
                element[g.dtype, g.device] = torch.empty((), dtype=g.dtype, device=g.device)
            stand_in = element[g.dtype, g.device].expand(g.numel())
            kind = GradientKind(type(g), g.dtype, plain=True, same_layout=True)
            place = f"parameter {i}"
            bindings[i] = Binding(
                i, 0, place, stand_in, kind, {}, (), Precision(g.dtype), chosen[i], i, regularize=True, amsgrad=False
            )
    return bindings
