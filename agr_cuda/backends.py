"""List the backends, and choose the one that updates a parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, triton
from . import native as core
from .precision import Precision
from .tensors import GradientKind, is_dense, is_plain, kernel_types

#: All backends, in order of preference.
BACKENDS = ("cuda", "triton", "cpu", "reference")

#: The parameter dtypes that the cuda, triton and cpu backends take.
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: The gradients of another type than their parameter that these backends take, as (parameter, gradient).
MIXED_GRADIENTS = (
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
)


def why_missing(backend: str) -> str | None:
    """Return why `backend` is not available and how to fix that, or None if it is available."""
    if backend == "reference":
        return None
    missing = core.why_missing()
    if missing is None and backend != "cpu":
        missing = (cuda if backend == "cuda" else triton).why_missing()
    return missing


def available_backends() -> list[str]:
    """Return the names of the available backends, in order of preference: of "cuda", "triton", "cpu", "reference".

    Which of them updates a parameter also depends on the parameter's device and dtype; `python -m agr_cuda` prints the
    choice for each combination.
    """
    return [backend for backend in BACKENDS if why_missing(backend) is None]


def missing_kernels(parameter: Tensor, gradient: GradientKind) -> str:
    """Return why there are no kernels for a parameter that they would take, by backend, and how to get them.

    Empty where they are there, and for what no kernels take: other devices, types and classes of tensors.
    """
    devices = {"cuda": ("cuda",), "triton": ("cuda", "xpu"), "cpu": ("cpu",)}
    wanted = [backend for backend, types in devices.items() if parameter.device.type in types]
    if not wanted or parameter.dtype not in NATIVE_DTYPES or not (is_plain(parameter) and gradient.plain):
        return ""
    reasons = {backend: why_missing(backend) for backend in wanted}
    if None in reasons.values():
        return ""
    if len(set(reasons.values())) == 1:
        return str(next(iter(reasons.values())))
    return "; ".join(f"{backend}: {why}" for backend, why in reasons.items())


def check_backend(backend: str | None) -> None:
    """Raise ValueError if `backend` is not the name of a backend, RuntimeError if that backend is not available."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be None or one of {', '.join(map(repr, BACKENDS))}")
    reason = why_missing(backend)
    if reason is not None:
        there = ", ".join(map(repr, available_backends()))
        raise RuntimeError(f"backend={backend!r} is not there: {reason}. There are {there}")


def why_not(
    backend: str, parameter: Tensor, gradient: GradientKind | None = None, precision: Precision | None = None
) -> str | None:
    """Return why `backend` does not take `parameter`, or None if it does. The backend must be available.

    Args:
        backend: the name of an available backend.
        parameter: the parameter.
        gradient: the kind of its gradients; None to check the parameter alone.
        precision: how its numbers are stored; None for state of the parameter's type.
    """
    if backend == "reference":
        return None
    device = parameter.device
    if not is_plain(parameter):
        return f"the {backend} backend takes plain tensors, not {type(parameter).__name__}"
    if device.type not in _device_types(backend):
        where = {"cpu": "the CPU", "cuda": "an NVIDIA GPU", "triton": "a GPU"}[backend]
        if backend == "triton" and triton.interpreting():
            where = "the CPU, since TRITON_INTERPRET is set"
        return f"the {backend} backend takes parameters on {where}, not on {device}"
    if device.type != "cpu":
        reason = cuda.why_not_on(device.index or 0) if backend == "cuda" else triton.why_not_on(device)
        if reason is not None:
            return reason
    if parameter.dtype not in NATIVE_DTYPES:
        return f"the {backend} backend takes {', '.join(map(str, NATIVE_DTYPES))}, not {parameter.dtype}"
    if not is_dense(parameter):
        return f"the {backend} backend takes dense parameters, not strides {parameter.stride()}"
    if gradient is not None and not gradient.plain:
        return f"the {backend} backend takes gradients that are plain tensors, not {gradient.class_.__name__}"
    of_gradient = parameter.dtype if gradient is None else gradient.dtype
    if of_gradient != parameter.dtype and (parameter.dtype, of_gradient) not in MIXED_GRADIENTS:
        return f"the {backend} backend takes no {of_gradient} gradients of {parameter.dtype} parameters"
    if backend == "cuda":
        types = kernel_types(parameter.dtype, of_gradient, precision or Precision(parameter.dtype))
        if not core.native().cuda_compiled("adamw", types):
            return f"no kernel of the cuda backend is compiled for {describe_types(types)}"
    return None


def describe_types(types: tuple[str, str, str, bool, bool]) -> str:
    """Return what a kernel is chosen by in words; see `kernel_types`."""
    parameter, gradient, state, master, stochastic = types
    words = f"{parameter} parameters, {gradient} gradients and {state} state"
    return words + (" with master weights" if master else "") + (" and stochastic rounding" if stochastic else "")


def _device_types(backend: str) -> tuple[str, ...]:
    return {"cpu": lambda: ("cpu",), "cuda": cuda.device_types, "triton": triton.device_types}[backend]()


def choose(parameter: Tensor, gradient: GradientKind | None = None, precision: Precision | None = None) -> str:
    """Return the first available backend that takes `parameter`."""
    # A GPU backend that runs on the CPU (a rehearsal, or Triton's interpreter) is used only if asked for by name.
    emulated = [b for b in ("cuda", "triton") if "cpu" in _device_types(b)]
    names = (b for b in available_backends() if b not in emulated)
    return next(b for b in names if why_not(b, parameter, gradient, precision) is None)
