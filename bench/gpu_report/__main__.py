"""Everything that needs a GPU, unattended: `python -m bench.gpu_report --out FOLDER`, or `make gpu-report`.

Builds the package for the GPU that is there, runs the tests of its backends, looks for bad memory accesses and races,
times and profiles, judges each of the kernel's tactics by a step without it, and tunes. Where the cuda backend cannot
be built, stages that are for it alone are skipped, and the others are about triton. Needs no network, changes no
setting of the GPU, and takes at most nine minutes: every stage has its own time limit, and one that fails or runs out
of time leaves the others alone. Three stages are run where they are asked for alone, with or after `build`, in
seven minutes of their own: `memory` and `sweep` beside other optimizers, and `train`, AGR in trainings of
the paper's size.

FOLDER gets a few files, so that they are easily brought home from a machine that is only lent: SUMMARY.md (printed at
the end too), report.json, log.txt with all output, pictures, a profile for Nsight Compute, and details.tar.gz with
everything else. All are up to date after every stage.

Exit code 0; 1 if a stage failed; 2 where there is no GPU, or for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu_report.place import Place
from bench.gpu_report.report import make
from bench.gpu_report.runner import Stage
from bench.gpu_report.stages import APART, BY_DEFAULT, STAGES

ROOT = Path(__file__).resolve().parents[2]

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
        "--stages",
        nargs="+",
        choices=STAGES,
        default=BY_DEFAULT,
        metavar="STAGE",
        help=f"of {', '.join(STAGES)} (default: all but {', '.join(sorted(APART))})",
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
