"""Keep optimizers usable in a child of fork(), which has only the thread that forked."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import AGROptimizer

_live_optimizers: weakref.WeakValueDictionary[int, AGROptimizer] = weakref.WeakValueDictionary()  # by id()
_unfreed_plans: list[Any] = []  # kept alive so that their GPU memory is not freed


def renew_lock_after_fork(optimizer: AGROptimizer) -> None:
    """Have `optimizer` get a new lock in children of this process."""
    _live_optimizers[id(optimizer)] = optimizer


def _after_fork_in_child() -> None:
    for optimizer in list(_live_optimizers.values()):
        if not optimizer._lock.acquire(blocking=False):
            # Another thread of the parent held the lock during a step, and does not exist in the child to finish it.
            # Parameters and state stay as they were at the fork, and the next step makes a new plan. A child cannot
            # use the parent's GPU context, so tensors on a GPU must not be freed here.
            plan, optimizer._plan = optimizer._plan, None
            if plan is not None and plan.device_launches:
                _unfreed_plans.append(plan)
        optimizer._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
