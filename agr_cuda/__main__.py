"""`python -m agr_cuda`: show what was built, which backend each device and type gets, and try every backend."""

from __future__ import annotations

import argparse
import json
import sys

from .doctor import Report, examine

WIDTH = 16


def show(report: Report) -> None:
    """Print the report as text."""
    for name, value in (*report.versions.items(), *report.environment.items()):
        print(f"{name:<{WIDTH}}{value}")
    print("\nbackends")
    for backend, reason in report.backends.items():
        print(f"  {backend:<{WIDTH - 2}}{'yes' if reason is None else f'no: {reason}'}")
    print("\nwhich backend updates a parameter")
    for i, (device, choice) in enumerate(report.choice.items()):
        if i == 0:
            print(" " * WIDTH + "".join(f"{dtype:<11}" for dtype in choice))
        print(f"  {device:<{WIDTH - 2}}" + "".join(f"{backend:<11}" for backend in choice.values()))
    print("\nsteps on random numbers, compared with backend='reference' (units in the last place)")
    for trial in report.trials:
        what = f"{trial.device}, {trial.optimizer}, {trial.dtype}"
        found = trial.error or f"{trial.difference:.3g}"
        print(f"  {trial.backend:<{WIDTH - 2}}{what:<28}{'ok' if trial.passed else 'WRONG'}: {found}")


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m agr_cuda",
        description="Show versions, what is built, which backend each device and type gets, and try every backend: "
        "all that a report of a fault needs. The exit status is 1 if a backend computes something wrong, or if the "
        "compiled core does not load.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    report = examine()
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        show(report)
    sys.exit(not report.healthy)


if __name__ == "__main__":
    main()
