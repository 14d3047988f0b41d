"""List the backends, and choose the one that updates a parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, triton
from . import native as core
from .tensors import GradientKind, is_dense, is_plain

#: All backends, in order of preference.
BACKENDS = ("cuda", "triton", "cpu", "reference")

#: The parameter dtypes that the cuda, triton and cpu backends take.
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def why_not(backend: str, parameter: Tensor, gradient: GradientKind | None = None) -> str | None:
    """Return why `backend` does not take `parameter`, or None if it does. The backend must be available.

    Args:
        backend: the name of an available backend.
        parameter: the parameter.
        gradient: the kind of its gradients; None to check the parameter alone.
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
    if gradient is not None and gradient.dtype != parameter.dtype:
        sixteen_bits = parameter.dtype in (torch.bfloat16, torch.float16)
        if not (sixteen_bits and gradient.dtype == torch.float32):
            return f"the {backend} backend takes no {gradient.dtype} gradients of {parameter.dtype} parameters"
    return None


def _device_types(backend: str) -> tuple[str, ...]:
    return {"cpu": lambda: ("cpu",), "cuda": cuda.device_types, "triton": triton.device_types}[backend]()


def choose(parameter: Tensor, gradient: GradientKind | None = None) -> str:
    """Return the first available backend that takes `parameter`."""
    # A GPU backend that runs on the CPU (a rehearsal, or Triton's interpreter) is used only if asked for by name.
    emulated = [b for b in ("cuda", "triton") if "cpu" in _device_types(b)]
    names = (b for b in available_backends() if b not in emulated)
    return next(b for b in names if why_not(b, parameter, gradient) is None)
