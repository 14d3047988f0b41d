"""Meters of memory: what is held after each of several actions, and the most that was held during it.

On a CPU, PyTorch's profiler tells every block that PyTorch's allocator hands out or takes back, to the byte. What a
library takes from the system by itself is not seen; none of the peers does so for anything of a tensor's size, nor does
agr_cuda (tests/test_bench_memory.py compares with the process's resident memory). On a GPU, PyTorch's caching allocator
keeps its own counts, in blocks of 512 bytes: a tensor of 256 bytes takes 512.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.measuring.clocks import Action

PHASE = "bench.memory phase"  # in the profile, the name of an action's range


class Phase(NamedTuple):
    """Bytes during one action, above what there was before the first one."""

    before: int  # held when it began
    peak: int  # held at most
    after: int  # held when it ended


Meter = Callable[[Sequence[Action]], list[Phase]]


def cpu_meter(actions: Sequence[Action]) -> list[Phase]:
    """Run the actions one after the other, and read from a profile what each holds of a CPU's memory.

    One profile of all actions, since the profiler says nothing about blocks that are older than itself.
    """
    with older_objects_aside(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for action in actions:
            with record_function(PHASE):
                action()
            gc.collect()  # what is garbage now was held during the action and not after it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return phases(events)


@contextmanager
def older_objects_aside() -> Iterator[None]:
    """Let collections of garbage pass over what there is now, which takes them most of their time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def phases(events: Sequence[dict[str, Any]]) -> list[Phase]:
    """Return what the events of a trace, as Chrome reads them, say of each action."""
    ranges = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == PHASE)
    changes = sorted(
        ((event["ts"], event["args"]) for event in events if event["name"] == "[memory]"),
        key=lambda change: (change[0], change[1]["Ev Idx"]),
    )
    return list(_phases(ranges, [(time, args["Bytes"]) for time, args in changes if args["Device Type"] == 0]))


def _phases(ranges: Sequence[tuple[float, float]], changes: Sequence[tuple[float, int]]) -> Iterator[Phase]:
    """Yield the phases, from ranges of time and changes in bytes, both in order."""
    held, place = 0, 0
    for begin, end in ranges:
        while place < len(changes) and changes[place][0] < begin:
            held += changes[place][1]
            place += 1
        before = peak = held
        while place < len(changes) and changes[place][0] <= end:
            held += changes[place][1]
            peak = max(peak, held)
            place += 1
        yield Phase(before, peak, held)


def cuda_meter(actions: Sequence[Action]) -> list[Phase]:
    """Run the actions one after the other, and ask PyTorch what each holds of the current CUDA device's memory."""
    first, found = torch.cuda.memory_allocated(), []
    for action in actions:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        counts = before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        found.append(Phase(*(count - first for count in counts)))
        gc.collect()
    return found


def meter_for(device: torch.device) -> Meter:
    """Return the meter of the device's kind."""
    return cuda_meter if device.type == "cuda" else cpu_meter
