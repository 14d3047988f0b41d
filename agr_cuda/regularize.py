"""AGR for any optimizer: regularize gradients in place."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .backends import check_backend
from .gradient_plan import GradientPlan
from .options import check_nonnegative, check_number, format_value, number
from .plan_cache import PlanCache
from .scaling import Scaling

_cache = PlanCache()
_caches_of_parents: list[PlanCache] = []  # kept, since a child of fork() must not free its parent's GPU memory


def regularize_gradients_(
    parameters: Tensor | Iterable[Tensor],
    *,
    max_norm: float | None = None,
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    r"""Replace the gradient of each parameter by its regularized gradient (arXiv 2407.16944), in place.

    $$ g_i \leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right) $$

    The sum is over one tensor. Call it between `backward()` and the step of any optimizer that knows nothing of AGR, as
    one calls torch.nn.utils.clip_grad_norm_; `agr_cuda.AdamW` and `agr_cuda.Adan` do it themselves. An all-zero
    gradient stays 0; one of one element becomes 0, so leave out parameters of one element that shall be trained.

    All gradients of a device and type are regularized by one launch (two by the triton backend), from the second call
    with the same parameters on without any preparation, and the host waits for nothing. It does wait for numbers from
    a GPU if the call has gradients on the CPU too.

    With `max_norm`, gradients are also clipped by their global norm, in the same launch if they are all of one device
    and type. The norm is taken before AGR, so that `max_norm` means what it means for clip_grad_norm_:

    $$
    g \leftarrow \psi(c g) = c\,\psi(g), \quad
        c = \min\left(1, \frac{\mathrm{max\_norm}}{\|g\|_2 + 10^{-6}}\right)
    $$

    With torch.amp.GradScaler, unscale the gradients first, as for clip_grad_norm_. The scaler then skips the step if
    there were infinities, and what has become of the gradients does not matter:

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        agr_cuda.regularize_gradients_(model.parameters(), max_norm=1.0)
        scaler.step(optimizer)
        scaler.update()

    `grad_scale` and `found_inf` are for programs that scale by themselves. They are read on the device.

    A call can be captured in a CUDA graph if one with the same parameters and options came before, outside of the
    capture. Its launch is from then on the graphs' alone and keeps its memory (a few bytes for every thousand elements)
    for the life of the process. Graphs that regularize the same parameters must not be replayed at the same time.

    Args:
        parameters: a parameter or an iterable of parameters of any shape. Those without a gradient are skipped. A
            gradient that several parameters share is regularized once.
        max_norm: the largest L2 norm of all gradients together, at least 0; 0 makes all gradients 0, and infinity only
            measures. None (default) does not clip.
        grad_scale: what all gradients are divided by first: a number above 0, or a tensor of one element. None
            (default) stands for 1.
        found_inf: a tensor of one element. If it is not 0, no gradient changes. None (default) stands for 0.
        backend: the backend, of `agr_cuda.available_backends()`. None (default) chooses for each gradient.

    Returns:
        None without `max_norm`; else the norm of all gradients, before clipping and AGR and divided by `grad_scale`, as
        a float64 tensor of shape () on the device of the first gradient (float32 on a device without float64). It is
        0 without gradients, and NaN if `found_inf` is not 0.

    Raises:
        TypeError: for an option of the wrong type.
        ValueError: for an option out of range, or a tensor that has not one element.
        RuntimeError: for sparse, expanded or overlapping gradients, for flat parameters of FSDP1, for a backend that is
            not there or does not take a gradient, and if a graph is captured and there was no such call before.

    Errors are raised before any gradient has changed.
    """
    global _outside_of_graphs
    if _outside_of_graphs is None:
        disable: Any = torch.compiler.disable
        _outside_of_graphs = disable(_regularize)
    norm: Tensor | None = _outside_of_graphs(parameters, max_norm, grad_scale, found_inf, backend)
    return norm


#: `_regularize` as torch.compile calls it, with one graph break, without tracing it. It is made by the first call and
#: not on import, because it imports the compiler, which takes a second; making an optimizer of PyTorch does so as well.
_outside_of_graphs: Any = None


def _regularize(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | None,
    grad_scale: Tensor | float | None,
    found_inf: Tensor | None,
    backend: str | None,
) -> Tensor | None:
    clip = max_norm is not None
    if clip:
        check_nonnegative("max_norm", max_norm)
    if backend is not None:
        check_backend(backend)
    scaling = _scaling(grad_scale, found_inf)
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    plan, gradients = _plan_for(given, clip, backend)
    try:
        norm = plan.run(gradients, number(max_norm) if clip else 0.0, scaling)
    finally:
        plan.lock.release()
    return _returned(norm, given, scaling.found_inf) if clip else None


def _scaling(grad_scale: Any, found_inf: Any) -> Scaling:
    """Check and return the gradient scale and the overflow flag."""
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if isinstance(value, Tensor):
            check_number(name, value)
            if value.is_complex():
                raise TypeError(f"{name} is a {value.dtype} tensor; it must be real")
    if grad_scale is not None and not isinstance(grad_scale, Tensor):
        check_number("grad_scale", grad_scale)
        if not grad_scale > 0:
            raise ValueError(f"grad_scale is {format_value(grad_scale)}; it must be greater than 0")
        grad_scale = float(grad_scale)
    if found_inf is not None and not isinstance(found_inf, Tensor):
        raise TypeError(f"found_inf is {found_inf!r}; it must be a tensor of one element or None")
    return Scaling(grad_scale, found_inf)


def _plan_for(parameters: list[Tensor], clip: bool, backend: str | None) -> tuple[GradientPlan, list[Tensor]]:
    """Return a plan, whose lock is held, and the gradients that it has read.

    Plans are kept by the parameters' identities, since two calls on the same parameters never overlap in time in a
    program that is right, while those on others may: then each has a launch of its own. That an identity may be that of
    a new parameter by now does no harm, since a plan checks what it depends on.
    """
    key = (clip, backend, *map(id, parameters))
    plan, captured = _cache.get(key)
    known = captured or plan
    if known is not None and known.capturing():
        for candidate in (captured, plan):
            if candidate is not None and (gradients := _read(candidate, parameters)) is not None:
                if candidate is plan:
                    _cache.capture(key, candidate)
                return candidate, gradients
    elif plan is not None and (gradients := _read(plan, parameters)) is not None:
        if not plan.captured:
            return plan, gradients
        plan.lock.release()
    plan = GradientPlan(parameters, clip, backend, plan)
    gradients = _read(plan, parameters)
    if gradients is None:
        raise RuntimeError("gradients were changed by another thread during regularize_gradients_()")
    _cache.put(key, plan)
    return plan, gradients


def _read(plan: GradientPlan, parameters: list[Tensor]) -> list[Tensor] | None:
    """Return the gradients if the plan fits, with its lock held; else None."""
    plan.lock.acquire()
    gradients = None
    try:
        gradients = plan.read(parameters)
    finally:
        if gradients is None:
            plan.lock.release()
    return gradients


@torch.no_grad()
def _returned(norm: Tensor | float, parameters: list[Tensor], found_inf: Tensor | None) -> Tensor:
    """Return the norm on the device of the first gradient, or NaN if nothing was regularized."""
    device = next((p.grad.device for p in parameters if p.grad is not None), torch.device("cpu"))
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if not isinstance(norm, Tensor):
        norm = torch.full((), norm, dtype=dtype, device=device)
    waits_not = device.type != "cpu"  # a copy to a CPU is not there before the device has made it
    norm = norm.to(device=device, dtype=dtype, non_blocking=waits_not)
    if found_inf is not None:
        skipped = found_inf.to(device=device, non_blocking=waits_not).reshape(()) != 0
        norm = norm.masked_fill(skipped, torch.nan)
    return norm


def _after_fork_in_child() -> None:
    """Begin anew: another thread of the parent may have held any lock."""
    global _cache
    _caches_of_parents.append(_cache)
    _cache = PlanCache()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
