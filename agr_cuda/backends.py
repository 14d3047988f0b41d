"""Which backends there are, and which of them updates which parameter."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .binding import is_dense, is_plain

_native: ModuleType | None
try:
    from . import _C as _native
except ImportError as error:
    _native = None
    _native_error = str(error)

#: Every backend, the preferred first.
BACKENDS = ("cuda", "triton", "cpu", "reference")

#: The types that the CPU kernels are compiled for.
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def native() -> ModuleType:
    """Return the native core, agr_cuda._C."""
    if _native is None:
        raise RuntimeError(f"agr_cuda's native core does not load: {_native_error}")
    return _native


def why_missing(backend: str) -> str | None:
    """Return why `backend` is not there and how to mend that, or None if it is there."""
    if backend == "reference":
        return None
    if backend == "triton":
        return "its kernels are not part of this version of agr-cuda"
    if _native is None:
        return f"agr_cuda's native core does not load ({_native_error}): install agr-cuda with a C++ compiler at hand"
    return str(_native.left_out) if backend == "cuda" else None


def available_backends() -> list[str]:
    """Return the names of the backends that are there, the preferred first.

    Which of them updates a parameter depends on its device and type as well: `python -m agr_cuda` shows it.
    """
    return [backend for backend in BACKENDS if why_missing(backend) is None]


def check_backend(backend: str | None) -> None:
    """Raise ValueError if `backend` is no backend's name, RuntimeError if that one is not there."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be None or one of {', '.join(map(repr, BACKENDS))}")
    reason = why_missing(backend)
    if reason is not None:
        there = ", ".join(map(repr, available_backends()))
        raise RuntimeError(f"backend={backend!r} is not there: {reason}. There are {there}")


def why_not(backend: str, parameter: Tensor, gradient: Tensor | None = None) -> str | None:
    """Return why `backend`, which is there, does not take `parameter` (with `gradient`), or None if it does."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if not is_plain(parameter):
            return f"the cpu backend takes plain tensors, not {type(parameter).__name__}"
        if parameter.device.type != "cpu":
            return f"the cpu backend takes parameters on the CPU, not on {parameter.device}"
        if parameter.dtype not in CPU_DTYPES:
            return f"the cpu backend takes {', '.join(map(str, CPU_DTYPES))}, not {parameter.dtype}"
        if not is_dense(parameter):
            return f"the cpu backend takes dense parameters, not strides {parameter.stride()}"
        if gradient is not None and not is_plain(gradient):
            return f"the cpu backend takes gradients that are plain tensors, not {type(gradient).__name__}"
        if gradient is not None and gradient.dtype != parameter.dtype:
            sixteen_bits = parameter.dtype in (torch.bfloat16, torch.float16)
            if not (sixteen_bits and gradient.dtype == torch.float32):
                return f"the cpu backend takes no {gradient.dtype} gradients of {parameter.dtype} parameters"
        return None
    raise AssertionError(backend)


def choose(parameter: Tensor, gradient: Tensor | None = None) -> str:
    """Return the first available backend that takes `parameter`."""
    return next(b for b in available_backends() if why_not(b, parameter, gradient) is None)
