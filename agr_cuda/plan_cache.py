"""Keep the plans of regularize_gradients_ from call to call: a bounded number of them, and all that graphs use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from .gradient_plan import GradientPlan

#: The most that plans may have together, besides the last one: gradients, and bytes of memory on GPUs.
MAX_TENSORS, MAX_DEVICE_BYTES = 32768, 64 << 20


class PlanCache:
    """Plans by key. The least recently used are dropped; those that a graph has captured never are.

    A captured launch's memory is used whenever its graph is replayed, and nothing tells when the last graph is gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: OrderedDict[Any, GradientPlan] = OrderedDict()
        self._captured: dict[Any, GradientPlan] = {}
        #: Captured plans that no longer fit their parameters' gradients.
        self._outdated: list[GradientPlan] = []
        #: The sums of what the plans of `_plans` have.
        self._tensors = self._device_bytes = 0

    def get(self, key: Any) -> tuple[GradientPlan | None, GradientPlan | None]:
        """Return the plan for ordinary calls, and the one that graphs have captured; None for one that is not there."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
            return plan, self._captured.get(key)

    def put(self, key: Any, plan: GradientPlan) -> None:
        """Keep a plan in place of the last one for this key, and drop others if there are too many."""
        with self._lock:
            self._drop(key)
            self._plans[key] = plan
            self._tensors += plan.tensors
            self._device_bytes += plan.device_bytes
            while len(self._plans) > 1 and (self._tensors > MAX_TENSORS or self._device_bytes > MAX_DEVICE_BYTES):
                self._drop(next(iter(self._plans)))

    def capture(self, key: Any, plan: GradientPlan) -> None:
        """Reserve the plan for ordinary calls, whose lock is held, for graphs, and keep it for good."""
        with self._lock:
            plan.captured = True
            self._drop(key)
            if key in self._captured:
                self._outdated.append(self._captured[key])
            self._captured[key] = plan

    def _drop(self, key: Any) -> None:
        plan = self._plans.pop(key, None)
        if plan is not None:
            self._tensors -= plan.tensors
            self._device_bytes -= plan.device_bytes
