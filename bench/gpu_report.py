"""Everything that needs a GPU, unattended: `python -m bench.gpu_report --out FOLDER`, or `make gpu-report`.

Builds the package for the GPU that is there, runs the tests of its backends, looks for bad memory accesses and races,
times, profiles and tunes. Where the cuda backend cannot be built, stages that are for it alone are skipped, and the
others are about triton. Needs no network, changes no setting of the GPU, and takes at most eight minutes: every stage
has its own time limit, and one that fails or runs out of time leaves the others alone.

FOLDER gets a few files, so that they are easily brought home from a machine that is only lent: SUMMARY.md (printed at
the end too), report.json, log.txt with all output, pictures, a profile for Nsight Compute, and details.tar.gz with
everything else. All are up to date after every stage.

Exit code 0; 1 if a stage failed; 2 where there is no GPU, or for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import gpu_summary
from bench.gpu_runner import Outcome, Stage, run_stages
from bench.gpu_stages import KERNEL, STAGES, Place

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("step-*.png", f"{KERNEL}-*.ncu-rep")  # what lies in the folder itself, not in the archive
LARGEST = 15_000_000  # bytes of one of those

PROBE = """
import json, sys, torch
if not (torch.version.cuda and torch.cuda.is_available()):
    sys.exit(f"PyTorch {torch.__version__} finds none")
found = torch.cuda.get_device_properties(0)
print(json.dumps({"name": found.name, "capability": [found.major, found.minor]}))
"""


def find_gpu() -> dict[str, Any]:
    """Return name and compute capability of the GPU. Raises RuntimeError where there is none.

    Another process looks, so that this one holds no memory of the GPU while it runs the others.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["Python failed"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


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
        summary = gpu_summary.render(self.device, self.outcomes, time.monotonic() - self._begin, names)
        (self.folder / "SUMMARY.md").write_text(summary)
        return summary


def make(folder: Path, device: str, stages: Callable[[Path], Sequence[Stage]]) -> int:
    """Run the stages, which are given a folder to work in, and leave the report in `folder`. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as work:
        report = Report(folder, Path(work), device)
        run_stages(stages(Path(work)), report.log, report.add)
        print(f"\n{report.write()}", end="", flush=True)
    return int(any(outcome.status == "failed" for outcome in report.outcomes))


def _terminate(number: int, frame: object) -> None:
    """Turn a termination into an exception, so that the running command is ended too."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Make the report of this machine's GPU. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-report"), metavar="FOLDER")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=f"of {', '.join(STAGES)}"
    )
    args = parser.parse_args(arguments)
    try:
        gpu = find_gpu()
    except RuntimeError as error:
        print(f"The GPU report needs an NVIDIA GPU and a PyTorch that sees it: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminate)
    capability = tuple(gpu["capability"])

    def stages(work: Path) -> list[Stage]:
        place = Place(ROOT, work, capability)
        return [STAGES[name](place) for name in args.stages]

    folder = args.out.resolve()
    os.chdir(ROOT)  # where the stages' commands find bench and tests
    return make(folder, gpu["name"], stages)


if __name__ == "__main__":
    sys.exit(main())
