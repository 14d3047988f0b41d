"""Optimizers in a child of fork(), where no thread is but the one that forked."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import AGROptimizer

_living: weakref.WeakValueDictionary[int, AGROptimizer] = weakref.WeakValueDictionary()  # by id
_abandoned: list[Any] = []


def remember(optimizer: AGROptimizer) -> None:
    """Give `optimizer` a lock of its own in children of this process."""
    _living[id(optimizer)] = optimizer


def _after_fork_in_child() -> None:
    for optimizer in list(_living.values()):
        if not optimizer._lock.acquire(blocking=False):
            # Another thread of the parent was in a step, and is not here to end it. What that step ran on is left as it
            # was at that moment, and the next is planned anew. What is on a GPU, which a child cannot use, is kept from
            # being freed here.
            plan, optimizer._plan = optimizer._plan, None
            if plan is not None and plan.on_devices:
                _abandoned.append(plan)
        optimizer._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
