"""DRAM's channels and the second-level cache of a GPU in the time model: when bytes that are asked for have come.

DRAM is a number of channels, each of which moves one piece at a time. Pieces go to channels at random, so that queues
form and latency grows with load as on hardware. What it leaves out: refresh, the change between reading and writing
(but for MIXED_NS), misses of address translation, and the port between the cache's two partitions.

CHANNELS, PIECE, MIXED_NS and GH200's bandwidth are fitted to RRZE-HPC/gpu-benches, gpu-stream/gh200.txt: bandwidth of
STREAM's kernels by the threads that run on a multiprocessor. `python -m bench latency --check-memory` shows both; they
differ by 6% (root of the mean square).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from math import log, sqrt
from random import Random

from bench.time_model.gpu import COPY_SHARE, GPUS, Gpu

CHANNELS = 256
PIECE = 1024  # bytes
MIXED_NS = 120.0  # what a read takes longer where writes are under way


class Memory:
    """DRAM's channels and the second-level cache's port."""

    def __init__(self, gpu: Gpu, seed: int = 0) -> None:
        self.gpu = gpu
        self.read_bytes = self.written_bytes = 0.0
        self._free = [0.0] * CHANNELS  # when each has done what it was asked for
        self._per_byte = CHANNELS / gpu.dram
        self._random = Random(seed).random
        self._port_free = 0.0

    def read(self, now: float, size: float) -> float:
        """Read from DRAM. Returns when all of it can be used."""
        self.read_bytes += size
        return self._move(now, size) + self.gpu.dram_ns + (MIXED_NS if self.written_bytes else 0.0)

    def write(self, now: float, size: float) -> float:
        """Write to DRAM. Returns when all of it is through."""
        self.written_bytes += size
        return self._move(now, size)

    def pass_port(self, now: float, size: float) -> float:
        """Move bytes between the second-level cache and multiprocessors. Returns when all of them are through."""
        self._port_free = max(self._port_free, now) + size / self.gpu.l2_bandwidth
        return self._port_free

    @property
    def drained(self) -> float:
        """When DRAM has done all; the mean of the channels, among which hardware spreads lines better than chance."""
        return sum(self._free) / CHANNELS

    def _move(self, now: float, size: float) -> float:
        end = now
        free, random, per_byte = self._free, self._random, self._per_byte
        while size > 0:
            piece = PIECE if size >= PIECE else size
            size -= piece
            channel = int(random() * CHANNELS)
            at = free[channel]
            at = (at if at > now else now) + piece * per_byte
            free[channel] = at
            if at > end:
                end = at
        return end


# Threads of a multiprocessor: GB/s that the kernels read, scale and triad moved, with 8 bytes a thread and array.
GH200_STREAM = {
    128: (243, 464, 798),
    256: (486, 854, 1408),
    512: (935, 1397, 2367),
    1024: (1715, 2269, 3338),
    1280: (2009, 2587, 3501),
    1536: (2314, 2854, 3686),
    2048: (2775, 3174, 3783),
}
STREAM_KERNELS = {"read": (1, 0), "scale": (1, 1), "triad": (3, 1)}  # arrays read and written
GH200 = replace(GPUS["h200"], title="GH200", copy=4100 * COPY_SHARE)


def stream(
    gpu: Gpu, bytes_read: float, bytes_written: float, turns: int = 24, turn_ns: float = 140.0, slots: int = 2
) -> float:
    """Return GB/s of a loop that reads, waits and writes on every multiprocessor.

    Args:
        gpu: What it runs on.
        bytes_read: Of one turn and multiprocessor.
        bytes_written: Likewise.
        turns: How often.
        turn_ns: What a turn takes besides.
        slots: Parts of a multiprocessor's work that wait on their own.
    """
    memory = Memory(gpu)
    random = Random(1).random
    # Events: time, serial number, turns that are left, whether what a turn reads has come.
    events = [(turn_ns * random(), slot, turns, False) for slot in range(gpu.multiprocessors * slots)]
    heapq.heapify(events)
    serial, end = len(events), 0.0
    while events:
        now, _, left, came = heapq.heappop(events)
        serial += 1
        if not came:
            heapq.heappush(events, (memory.read(now + turn_ns, bytes_read / slots), serial, left, True))
            continue
        end = max(end, now, memory.write(now, bytes_written / slots) if bytes_written else now)
        if left > 1:
            heapq.heappush(events, (now, serial, left - 1, False))
    return (memory.read_bytes + memory.written_bytes) / end


@dataclass(frozen=True)
class Fit:
    """A STREAM kernel: GB/s measured and in the model."""

    kernel: str
    threads: int
    measured: float
    modelled: float


def stream_fits() -> list[Fit]:
    """Return all STREAM kernels that were measured."""
    return [
        Fit(kernel, threads, figure, stream(GH200, 8 * threads * read, 8 * threads * written))
        for threads, measured in GH200_STREAM.items()
        for (kernel, (read, written)), figure in zip(STREAM_KERNELS.items(), measured, strict=True)
    ]


def misfit(fits: list[Fit]) -> float:
    """Return the root of the mean square of what the model is off."""
    return sqrt(sum(log(fit.modelled / fit.measured) ** 2 for fit in fits) / len(fits))


def copy_bandwidth(gpu: Gpu) -> float:
    """Return GB/s of a copy with 64 KB in flight on a multiprocessor, which Gpu.copy stands for."""
    return stream(gpu, 65536, 65536, turns=40, turn_ns=20.0)
