"""Clocks for one step on a CPU or a GPU, the copy bandwidth, and the number of kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Action = Callable[[], object]
COPY_PERIOD = {"cpu": 2.0, "cuda": 0.2}  # seconds between two copies of the bandwidth probe; a GPU's take less time
COPY_BYTES_PER_ELEMENT = 8  # float32, read once and written once
SPIN_CYCLES_PER_SECOND = 2e9  # about a GPU's clock


class Timing(NamedTuple):
    """One step, in seconds."""

    step: float  # until the work is done: wall time on a CPU, the device's own time on a GPU
    host: float  # until step() returns to the caller; equal to `step` on a CPU


Clock = Callable[[Action], Timing]


def cpu_clock(action: Action) -> Timing:
    """Time one call on the CPU."""
    begin = time.perf_counter()
    action()
    seconds = time.perf_counter() - begin
    return Timing(seconds, seconds)


def idle_clock(action: Action) -> Timing:
    """Time one call on the current CUDA device, idle at first, until the call returns: the host's time alone."""
    torch.cuda.synchronize()
    return cpu_clock(action)


def cuda_clock(action: Action) -> Timing:
    """Time two calls on the current CUDA device: one for the host's time, one for the device's.

    The first starts on an idle device and is timed until it returns. The second is queued behind a spinning
    kernel that lasts longer than the host needs, so that the events enclose the device's work without
    gaps in which it waits for the host. (A step that waits for the device, or that launches more kernels than
    the queue holds, shows those gaps nevertheless, as it would in training.)
    """
    cuda: Any = torch.cuda  # parts of it have no types
    host = idle_clock(action).host
    cuda.synchronize()

    first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    spin_seconds = min(2.0 * host + 1e-4, 0.1)
    cuda._sleep(int(spin_seconds * SPIN_CYCLES_PER_SECOND))
    first.record()
    action()
    last.record()
    cuda.synchronize()
    return Timing(first.elapsed_time(last) * 1e-3, host)


def clock_for(device: torch.device) -> Clock:
    """Return the clock of the device's kind."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def host_clock_for(device: torch.device) -> Clock:
    """Return the clock of the host's time, which on a CPU is the whole."""
    return idle_clock if device.type == "cuda" else cpu_clock


class CopyProbe:
    """The bandwidth of a large float32 `copy_`, sampled between the rounds it is compared with."""

    def __init__(self, device: torch.device, mebibytes: int) -> None:
        elements = mebibytes * 2**20 // 4
        self._source = torch.ones(elements, dtype=torch.float32, device=device)
        self._target = torch.zeros(elements, dtype=torch.float32, device=device)
        self._clock = clock_for(device)
        self._period = COPY_PERIOD[device.type]
        self._bytes = elements * COPY_BYTES_PER_ELEMENT
        self._copy()
        self.clear()

    def clear(self) -> None:
        """Forget the samples so far, and sample at the next call."""
        self.samples: list[float] = []  # bytes a second
        self._last = float("-inf")

    def __call__(self) -> None:
        """Sample once if the last sample is COPY_PERIOD old."""
        if time.perf_counter() - self._last >= self._period:
            self.samples.append(self._bytes / self._clock(self._copy).step)
            self._last = time.perf_counter()

    def _copy(self) -> None:
        self._target.copy_(self._source)


def count_kernels(action: Action) -> int:
    """Count the kernels that one call launches on the current CUDA device, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    others = ("Memcpy", "Memset", "Optimizer.")  # the last: PyTorch's own mark around an optimizer's step
    return sum(
        event.device_type.name == "CUDA" and not event.name.startswith(others) for event in profiler.events() or ()
    )
