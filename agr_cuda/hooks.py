"""The surroundings of a step: hooks, the profiler, torch.compile, and the stack level of warnings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as optimizer_module


def caller_stacklevel() -> int:
    """Return the `stacklevel` with which a warning points at the code that called step().

    It skips the frames of this package and of torch, whose schedulers and wrappers may be in between.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and (frame.f_globals.get("__name__") or "").startswith(("agr_cuda.", "torch.")):
        level, frame = level + 1, frame.f_back
    return level - 1  # without this function's own frame


def with_step_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `step` as torch.optim.Optimizer does, for hooks and the profiler, but at no cost if there are none.

    Entering and leaving a profiler region takes longer than the rest of the host's work for a step of a few hundred
    tensors.
    """
    with_hooks: Any = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A subclass that overrides step() has already been wrapped by torch.optim.Optimizer, which runs the hooks.
        outer: Any = type(self).step
        if outer is not wrapper and getattr(outer, "__code__", None) is with_hooks.__code__:
            return step(self, *args, **kwargs)
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or pre_hooks or post_hooks
        return (with_hooks if hooks or profiling() else step)(self, *args, **kwargs)

    pre_hooks, post_hooks = optimizer_module._global_optimizer_pre_hooks, optimizer_module._global_optimizer_post_hooks
    profiling = torch._C._autograd._profiler_enabled
    wrapper.hooked = True  # type: ignore[attr-defined]  # tells torch.optim.Optimizer not to wrap it again
    return wrapper


@functools.cache
def exclude_from_compile(base: Any) -> None:
    """Exclude `base.step` from torch.compile, which then breaks the graph there and traces none of this package.

    It is called when the first optimizer is made and not on import, because importing the compiler takes a second.
    torch.optim.Optimizer imports it at that time as well.
    """
    disable: Any = torch.compiler.disable
    base.step = disable(base.step)
