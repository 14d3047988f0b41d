"""Runs side by side, each in a process with one thread, and the time that is left."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from types import TracebackType

import torch

from bench.training.run import Result, Run, train
from bench.training.settings import Setting


def _begin(stop: multiprocessing.connection.Connection) -> None:
    """Make a process ready for runs: one thread, and an end when it is told, or the process that started it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the one that started them decides
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # on a GPU, as one trains there
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel, stop])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers:
    """Processes that run trainings.

    Args:
        count: of processes.
        setting: of all runs.
        device: where they train.
        deadline: of time.monotonic(), after which no further run begins; None: none.
    """

    def __init__(self, count: int, setting: Setting, device: torch.device, deadline: float | None) -> None:
        self._count, self._setting, self._device, self._deadline = count, setting, device, deadline
        # Not forked: a process that has used threads or a GPU cannot be.
        context = multiprocessing.get_context("spawn")
        # Readable to the processes when this end of it is closed.
        stop, self._stop = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(stop,))

    def run(self, runs: Sequence[Run]) -> Iterator[Result]:
        """Yield results as they come. Runs begin in the order in which they are given."""
        waiting = iter(runs)
        going: set[Future[Result]] = set()
        while True:
            while len(going) < self._count and not self.late and (run := next(waiting, None)) is not None:
                going.add(self._pool.submit(train, run, self._setting, self._device))
            if not going:
                return
            done, going = wait(going, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.close()  # nobody would take what is still running
        self._pool.shutdown(cancel_futures=True)


class TimeLeft:
    """How long the runs that are left will take, from those of the same task that have ended."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._seconds: dict[str, list[float]] = {}

    def add(self, result: Result) -> None:
        """Count a result in."""
        self._seconds.setdefault(result.run.task, []).append(result.seconds)

    def seconds(self, runs: Sequence[Run]) -> float | None:
        """Return how long these runs take, or None before the first has ended."""
        if not self._seconds:
            return None
        of_task = {task: statistics.fmean(seconds) for task, seconds in self._seconds.items()}
        other = statistics.fmean(of_task.values())
        return sum(of_task.get(run.task, other) for run in runs) / self._workers
