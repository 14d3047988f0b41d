"""How far a long command is, and how long the rest will take: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

BETWEEN_LINES = 30.0  # seconds


def duration(seconds: float | None) -> str:
    """Return a duration as hours, minutes and seconds; a dash where it is not known."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


class Progress:
    """Shows how far a command is."""

    def __init__(self) -> None:
        self._shown = float("-inf")
        self._phase = ""
        self._bar = None
        if sys.stdout.isatty():
            try:
                from rich import progress
            except ModuleNotFoundError:  # on a machine that was set up for training alone, say
                return
            columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[left]}")
            self._bar = progress.Progress(*columns)
            self._task = self._bar.add_task("", total=None, left="")

    def show(self, phase: str, done: int, total: int, seconds_left: float | None) -> None:
        """Show that so many of all parts are done."""
        left = f"{duration(seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, description=phase, completed=done, total=total, left=left)
        elif phase != self._phase or done == total or time.monotonic() > self._shown + BETWEEN_LINES:
            print(f"{phase}: {done} of {total}, {left}", flush=True)
            self._shown, self._phase = time.monotonic(), phase

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
