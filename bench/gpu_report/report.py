"""The folder of a GPU report: its files, brought up to date after every stage."""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from bench.gpu_report.place import KERNEL
from bench.gpu_report.runner import Outcome, Stage, run_stages
from bench.gpu_report.summary import render

BESIDE = ("step-*.png", f"{KERNEL}-*.ncu-rep")  # what lies in the folder itself, not in the archive
LARGEST = 15_000_000  # bytes of one of those


class Report:
    """The folder of a report."""

    def __init__(self, folder: Path, work: Path, device: str) -> None:
        self.folder, self.work, self.device = folder, work, device
        self.outcomes: list[Outcome] = []
        self.date = datetime.now().astimezone().isoformat(timespec="seconds")
        self._begin = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for path in (path for pattern in BESIDE for path in folder.glob(pattern)):
            path.unlink()  # an earlier report's
        self.log = folder / "log.txt"
        self.log.write_text(f"{device}, {self.date}\n")

    def add(self, outcome: Outcome) -> None:
        """Note that a stage is over, and bring all files up to date."""
        self.outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s  {outcome.reason}", flush=True)
        self.write()

    def write(self) -> str:
        """Write all files and return the summary."""
        beside = [path for pattern in BESIDE for path in self.work.glob(pattern) if path.stat().st_size <= LARGEST]
        for path in beside:
            shutil.copy(path, self.folder)
        with tarfile.open(self.folder / "details.tar.gz", "w:gz") as archive:
            for path in sorted(set(self.work.iterdir()) - set(beside)):
                archive.add(path, path.name)
        document = {
            "format": 1,
            "device": self.device,
            "date": self.date,
            "stages": [asdict(outcome) for outcome in self.outcomes],
        }
        (self.folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
        names = sorted({path.name for path in self.folder.iterdir() if path.is_file()} | {"SUMMARY.md"})
        summary = render(self.device, self.outcomes, time.monotonic() - self._begin, names)
        (self.folder / "SUMMARY.md").write_text(summary)
        return summary


def make(folder: Path, device: str, stages: Callable[[Path], Sequence[Stage]]) -> int:
    """Run the stages, which are given a folder to work in, and leave the report in `folder`. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as work:
        report = Report(folder, Path(work), device)
        run_stages(stages(Path(work)), report.log, report.add)
        print(f"\n{report.write()}", end="", flush=True)
    return int(any(outcome.status == "failed" for outcome in report.outcomes))
