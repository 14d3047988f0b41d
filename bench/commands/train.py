"""Train small models on real data with AGR, without, and with controls: whether it makes training better.

AdamW and Adan, each alone, with AGR, with a placebo (AGR's coefficients, shuffled within each tensor at every step),
and with one bit of one weight flipped at the beginning, which shows how much of a difference is chaos. Around AdamW,
gradient centralization, normalization and clipping too. A grid of learning rates and weight decays is searched for
each optimizer, with seeds of its own; then all train from the same weights on the same batches, seed by seed.
docs/evidence.md says beforehand how the runs are judged.

Every finished run is kept in train-TAG.jsonl of the output folder. Interrupted, the same command goes on from there.
At the end writes train-TAG.json and .png. Exit code 0; 2 for bad arguments; 130 where interrupted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

import agr_cuda
from bench.commands import options
from bench.measuring import machine
from bench.reporting import documents, drawing, terminal
from bench.reporting.progress import Progress
from bench.tasks import TASKS
from bench.training.arms import ARMS
from bench.training.plan import choose, judged, search
from bench.training.run import Result, Run
from bench.training.settings import SETTINGS, Setting
from bench.training.store import Store, UnusableStoreError
from bench.training.workers import TimeLeft, Workers

DIGITS = 9  # of losses: one flipped bit changes the eighth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.set_defaults(refuse=parser.error)
    parser.add_argument(
        "--setting",
        type=options.key_of("setting", SETTINGS),
        default="full",
        metavar="NAME",
        help=f"what is run: {', '.join(SETTINGS)}; short takes five minutes, large is for a GPU (default: full)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=options.key_of("task", TASKS),
        metavar="TASK",
        help=f"what is trained: {', '.join(TASKS)} (default: all of the setting's size)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        type=options.key_of("arm", ARMS),
        metavar="ARM",
        help="what is compared; adamw, and adan where one of its arms is there, always are (default: the setting's)",
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        type=options.natural_int,
        metavar="SEED",
        help="the first seed of each set of judged runs; sets share no seed (default: the setting's)",
    )
    parser.add_argument(
        "--seeds", type=options.positive_int, metavar="COUNT", help="seeds of a set (default: the setting's)"
    )
    parser.add_argument(
        "--jobs",
        type=options.positive_int,
        default=machine.cores(),
        metavar="COUNT",
        help=f"runs at a time, with one thread each (default: one a core, here {machine.cores()})",
    )
    parser.add_argument(
        "--minutes",
        type=options.positive_float,
        metavar="MINUTES",
        help="begin no further run after this time (default: no limit); the same command goes on later",
    )
    options.add_device(parser)
    options.add_output(parser, "; the same command with an equal one goes on (default: the setting's name)")


def chosen_setting(args: argparse.Namespace) -> Setting:
    """Return the setting with what was asked for instead. Raises ValueError where that does not fit together."""
    setting = SETTINGS[args.setting]
    there = [*setting.steps]
    missing = [name for name in args.tasks or there if name not in there]
    if missing:
        raise ValueError(f"setting {args.setting} has no task {missing[0]!r}: allowed are {', '.join(there)}")
    arms: Sequence[str] = args.arms or setting.arms
    bases = {ARMS[name].base for name in arms} | {"adamw"}
    return replace(
        setting,
        arms=tuple(dict.fromkeys([*sorted(bases), *arms])),
        sets=tuple(args.sets or setting.sets),
        seeds=args.seeds or setting.seeds,
    )


def where_it_runs(device: torch.device) -> dict[str, str]:
    """Return what moves a run's last digits, by which runs that are compared must not differ."""
    return {
        "device": device.type,
        "processor": machine.device_name(device),
        "torch": torch.__version__,
        "agr_cuda": agr_cuda.__version__,
    }


def found_by_search(store: Store) -> list[Result]:
    """Return the results of the search."""
    return [result for result in store.results.values() if not result.run.judged]


def compare(args: argparse.Namespace, setting: Setting, store: Store, deadline: float | None) -> bool:
    """Run what has not been run yet, and keep it. Returns whether all has been run."""
    left = TimeLeft(args.jobs)
    for result in store.results.values():
        left.add(result)
    with Workers(args.jobs, setting, args.device, deadline) as workers, Progress() as progress:

        def run_all(phase: str, runs: Sequence[Run], more: int) -> bool:
            missing = {run.key: run for run in runs if run.key not in store.results}

            def show() -> None:
                done, seconds = len(runs) - len(missing), left.seconds([*missing.values()])
                if seconds is not None and runs:
                    seconds *= 1 + more / len(runs)
                progress.show(phase, done, len(runs), seconds)

            show()
            for result in workers.run([*missing.values()]):
                store.add(result)
                left.add(result)
                del missing[result.run.key]
                show()
            return not missing

        searching = search(setting, args.tasks)
        # Each arm is judged at one point, or at two.
        whole = run_all("search", searching, len(args.tasks) * len(setting.arms) * setting.seeds * len(setting.sets))
        if not whole:
            return False
        choices = choose(found_by_search(store))
        return run_all("judged", judged(setting, args.tasks, choices), 0)


def document(args: argparse.Namespace, setting: Setting, store: Store, whole: bool) -> dict[str, object]:
    """Return what is written down of all runs."""
    results = [*store.results.values()]
    return {
        "format": 1,
        "command": "train",
        "machine": machine.describe(args.device),
        "settings": {"setting": args.setting, "tasks": args.tasks},
        "design": setting.record(),
        "complete": whole,
        "seconds_of_all_runs": sum(result.seconds for result in results),
        "runs": [result.record() for result in results],
    }


def run(args: argparse.Namespace) -> int:
    """Run the comparison. Returns 0, or 130 where it was interrupted."""
    try:
        setting = chosen_setting(args)
    except ValueError as error:
        args.refuse(str(error))
    args.tasks = [*dict.fromkeys(args.tasks or setting.steps)]
    console = terminal.console()
    path = args.out / f"train-{args.tag or args.setting}.json"
    try:
        store = Store(path.with_suffix(".jsonl"), setting.of_a_run() | where_it_runs(args.device))
    except (UnusableStoreError, OSError) as error:
        args.refuse(str(error))
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    with store:
        try:
            whole = compare(args, setting, store, deadline)
        except KeyboardInterrupt:
            console.print(f"Interrupted: the same command goes on, with {len(store.results)} runs that are done.")
            return 130
        written = document(args, setting, store, whole)
    documents.write(path, written, DIGITS)
    if not whole:
        console.print("The time is over, and the comparison is not complete: the same command goes on.")
    console.print(f"Wrote {show(console, path)}", highlight=False, soft_wrap=True)
    return 0


def show(console: terminal.Console, path: Path) -> str:
    """Print the tables of a result, and draw it, where it has runs that can be compared. Returns what was written."""
    if find_spec("scipy") is None:  # on a machine that was set up for training alone, say
        console.print("No tables, since scipy is not installed.")
    else:
        from bench.reporting import train_tables

        grids = train_tables.all_grids(documents.read(path))
        for grid in grids:
            console.print(grid.shown())
        if not grids:
            return str(path)
    return drawing.draw(path, "train_chart")
