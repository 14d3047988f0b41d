"""Where a GPU report is made, and the programs that its stages run there."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_report.runner import Command, Skip

KERNEL = "agr_step"  # in the name of what makes the step


@dataclass(frozen=True)
class Place:
    """Where a report is made."""

    root: Path  # the repository
    work: Path  # for the files of the stages
    capability: tuple[int, int]  # of the GPU

    @property
    def backends(self) -> Path:
        """The file in which the build leaves what WHICH_BACKENDS finds."""
        return self.work / "backends.json"

    def why_missing(self, backend: str) -> str | None:
        """Return why the build left a backend out, or None: it is there, or nothing was built in this report."""
        if not self.backends.exists():
            return None
        reason: str | None = json.loads(self.backends.read_text())["reasons"][backend]
        return reason

    def needs_cuda(self) -> None:
        """Skip a stage that is for the cuda backend alone where that is not there."""
        reason = self.why_missing("cuda")
        if reason is not None:
            raise Skip(f"no cuda backend: {reason}")


def python(*words: str, limit: float | None = None, **environment: str) -> Command:
    """Return a command of the Python that runs this."""
    # Python's own output would wait in a buffer for the end of a process that may be stopped before it.
    return Command((sys.executable, *words), {"PYTHONUNBUFFERED": "1", **environment}, limit)


def tool(name: str) -> str:
    """Return the path of a program; Skip where it is not there."""
    path = shutil.which(name)
    if path is None:
        raise Skip(f"{name} is not on PATH")
    return path
