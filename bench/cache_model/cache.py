"""A GPU's second-level cache as the cache model sees it: lines, priorities, and what DRAM moves for them."""

from __future__ import annotations

from collections import OrderedDict

# Priorities, in the order in which lines are evicted.
EVICT_FIRST, NORMAL, EVICT_LAST = range(3)


class Cache:
    """Lines in three classes of priority, the least recently used of the lowest class evicted first.

    A line here is whatever is read or written under one key; written lines are written back once, when they are evicted
    or flushed.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used: float = 0
        self.read_bytes: float = 0
        self.written_bytes: float = 0
        self._classes: tuple[OrderedDict[int, tuple[float, bool]], ...] = (OrderedDict(), OrderedDict(), OrderedDict())

    def read(self, key: int, size: float, priority: int) -> bool:
        """Read a line, which then has this priority. Returns whether it was there; if not, DRAM reads it."""
        for lines in self._classes:
            if key in lines:
                self._classes[priority][key] = lines.pop(key)
                return True
        self.read_bytes += size
        self._enter(key, size, False, priority)
        return False

    def write(self, key: int, size: float, priority: int) -> None:
        """Overwrite all of a line, which DRAM therefore need not read first where it is not there."""
        for lines in self._classes:
            if key in lines:
                self.used -= lines.pop(key)[0]
        self._enter(key, size, True, priority)

    def hold(self, size: float) -> None:
        """Read what is in use until `release` and cannot be evicted."""
        self.used += size
        if self.used > self.capacity:
            self._evict()

    def release(self, size: float) -> None:
        """End `hold`."""
        self.used -= size

    def flush(self) -> None:
        """Write back and forget everything."""
        capacity, self.capacity = self.capacity, -1
        self._evict()
        self.capacity = capacity

    def _enter(self, key: int, size: float, dirty: bool, priority: int) -> None:
        self._classes[priority][key] = (size, dirty)
        self.used += size
        if self.used > self.capacity:
            self._evict()

    def _evict(self) -> None:
        for lines in self._classes:
            while lines and self.used > self.capacity:
                _, (size, dirty) = lines.popitem(last=False)
                self.used -= size
                if dirty:
                    self.written_bytes += size
