"""What is around a step: hooks, profilers, and the code that warnings point at."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as optimizer_module


def level_of_caller() -> int:
    """Return the stacklevel with which a warning points at whoever called step(), through whatever wraps that."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and (frame.f_globals.get("__name__") or "").startswith(("agr_cuda.", "torch.")):
        level, frame = level + 1, frame.f_back
    return level - 1  # of whoever asks this


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Let hooks and profilers see a step, as torch.optim.Optimizer does, without its price where there are none.

    Entering and leaving a region of the profiler takes longer than all that a step of some hundred tensors does else.
    """
    seen: Any = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A subclass has a step of its own, which torch.optim.Optimizer has given the hooks.
        outer: Any = type(self).step
        if outer is not wrapper and getattr(outer, "__code__", None) is seen.__code__:
            return step(self, *args, **kwargs)
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or pre_hooks or post_hooks
        return (seen if hooks or profiling() else step)(self, *args, **kwargs)

    pre_hooks, post_hooks = optimizer_module._global_optimizer_pre_hooks, optimizer_module._global_optimizer_post_hooks
    profiling = torch._C._autograd._profiler_enabled
    wrapper.hooked = True  # type: ignore[attr-defined]  # so that torch.optim.Optimizer does not do it again
    return wrapper


@functools.cache
def passed_by_compilers(base: Any) -> None:
    """Have torch.compile leave `base.step` to Python: it breaks the graph there, and looks at none of our frames.

    Called when the first optimizer is made, not on import: the compiler takes a second to import, and
    torch.optim.Optimizer imports it at that moment too.
    """
    disable: Any = torch.compiler.disable
    base.step = disable(base.step)
