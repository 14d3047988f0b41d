"""Sweep the tunables of the CUDA launch: `python -m bench.gpu_report.tune --out FILE.json`.

The cuda backend reads them from the environment when it lays a schedule: AGR_CUDA_CHUNK (elements of a chunk),
AGR_CUDA_WINDOW and AGR_CUDA_LEAD (bytes of gradient), AGR_CUDA_BLOCKS (blocks a multiprocessor). First each is varied
alone, then the best values of all are tried together; with --product, all combinations of the values given. Every
setting has an optimizer of its own over the same parameters and state, and all take turns, as in the step benchmark.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

import agr_cuda
from bench.commands import options
from bench.measuring import clocks, machine, races
from bench.measuring.clocks import CopyProbe
from bench.measuring.races import Lane
from bench.measuring.stats import Summary, paired_ratios, summarize
from bench.reporting import documents, terminal
from bench.reporting.units import duration, times
from bench.workloads import contenders
from bench.workloads.shapes import ModelSet
from bench.workloads.tensors import Workload

MIB = 2**20
SWEPT = {
    "chunk": (2048, 4096, 8192, 16384, 32768),
    "window": (4 * MIB, 8 * MIB, 12 * MIB, 16 * MIB, 24 * MIB, 32 * MIB),
    "lead": (0, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB),
    "blocks": (1, 2, 3, 4),
}
SETS = ("gpt2", "vit-b-16", "llama-3.2-1b")
WORTH = 0.99  # of the default's time, on average over the sets: what a value must beat to be combined with others
BYTES_PER_ELEMENT = 4 * contenders.ACCESSES["AdamW"]  # in float32

Setting = Mapping[str, int]  # tunables that are not at their default
DEFAULT: Setting = {}


@dataclass(frozen=True)
class Result:
    """One setting on one set."""

    set: str
    setting: Setting
    step_s: Summary
    ratio: Summary  # to the default setting in the same round
    share_of_copy: float


def variable(name: str) -> str:
    """Return the environment variable of a tunable."""
    return f"AGR_CUDA_{name.upper()}"


def label(setting: Setting) -> str:
    """Return how a setting is shown."""
    shown = {
        name: f"{value / MIB:g} MiB" if name in ("window", "lead") else str(value) for name, value in setting.items()
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "default"


def one_at_a_time(swept: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Return the default and every value of every tunable alone."""
    return [DEFAULT, *({name: value} for name, values in swept.items() for value in values)]


def combinations(swept: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Return the default and every combination of values."""
    return [DEFAULT, *(dict(zip(swept, values, strict=True)) for values in product(*swept.values()))]


def averages(results: Sequence[Result]) -> list[tuple[float, Setting]]:
    """Return each setting with the geometric mean of its ratios over the sets, the fastest first."""
    ratios: dict[str, list[float]] = {}
    settings: dict[str, Setting] = {}
    for result in results:
        ratios.setdefault(label(result.setting), []).append(result.ratio.median)
        settings[label(result.setting)] = result.setting
    means = [(geometric_mean(values), settings[name]) for name, values in ratios.items()]
    return sorted(means, key=lambda pair: pair[0])


def best_together(results: Sequence[Result]) -> Setting:
    """Return the best value of each tunable that is worth it."""
    best: dict[str, int] = {}
    for mean, setting in averages(results):
        if mean < WORTH and len(setting) == 1:
            (name,) = setting
            best.setdefault(name, setting[name])
    return best


class Environment:
    """Sets a setting's variables for as long as its optimizer steps: that is when schedules are laid."""

    def __init__(self, setting: Setting) -> None:
        self._values = {variable(name): str(setting[name]) if name in setting else None for name in SWEPT}

    def swap(self) -> None:
        """Exchange the environment's values with ours."""
        before = {name: os.environ.get(name) for name in self._values}
        for name, value in self._values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._values = before


def measure_set(
    model: ModelSet, settings: Sequence[Setting], device: torch.device, seconds: float, probe: CopyProbe
) -> list[Result]:
    """Time AGR-AdamW on one model set with every setting; the first is the one to compare with."""
    clock = clocks.clock_for(device)
    workload = Workload(model.shapes, device, torch.float32)
    state: dict[torch.Tensor, Any] = {}
    lanes = []
    for setting in settings:
        optimizer = agr_cuda.AdamW(workload.parameters, lr=contenders.LEARNING_RATE, backend=device.type)
        optimizer.state.update({parameter: dict(values) for parameter, values in state.items()})
        environment = Environment(setting)
        lanes.append(Lane(label(setting), optimizer.step, environment.swap, environment.swap, repeats=1))
        for number in range(2):
            workload.turn(number)
            lanes[-1].visit(clock)
        state = optimizer.state
    probe.clear()
    probe()
    timings = races.race(lanes, clock, rounds=1000, seconds=seconds, new_round=workload.turn, between=probe)
    copy = summarize(probe.samples).median
    unit = [timing.step for timing in timings[lanes[0].name]]
    results = []
    for setting, lane in zip(settings, lanes, strict=True):
        steps = [timing.step for timing in timings[lane.name]]
        step_s = summarize(steps)
        share = BYTES_PER_ELEMENT * model.elements / step_s.median / copy
        results.append(Result(model.name, setting, step_s, paired_ratios(steps, unit), share))
    return results


def ranking(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return what is shown of each setting, the fastest on average first."""
    ranked: list[dict[str, Any]] = []
    for mean, setting in averages(results):
        cells = {
            found.set: f"{duration(found.step_s.median)} {times(found.ratio.median)} {100 * found.share_of_copy:.0f}%"
            for found in results
            if found.setting == setting
        }
        ranked.append({"setting": label(setting), "sets": cells, "average": mean})
    return ranked


def table(ranked: Sequence[Mapping[str, Any]], title: str) -> terminal.Table:
    """Return a row a setting, a column a set."""
    made = terminal.table(title, ["setting"], [*ranked[0]["sets"], "average"])
    for entry in ranked:
        made.add_row(entry["setting"], *entry["sets"].values(), f"{entry['average']:.3f}x")
    return made


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report.tune", description=__doc__)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=options.device, default=default_device, help="cpu tries the sweep itself out")
    options.add_sets(parser, SETS)
    parser.add_argument("--seconds", type=options.positive_float, default=6.0, help="a set's (default: 6)")
    for name, values in SWEPT.items():
        parser.add_argument(f"--{name}", nargs="*", type=options.natural_int, default=values, metavar="VALUE")
    parser.add_argument("--product", action="store_true", help="try all combinations of the values")
    parser.add_argument("--copy-mebibytes", type=options.positive_int, default=1024, metavar="MIB")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Sweep, print tables and write the figures as JSON."""
    args = build_parser().parse_args(arguments)
    device = torch.device(args.device)
    swept = {name: tuple(getattr(args, name)) for name in SWEPT if getattr(args, name)}
    settings = combinations(swept) if args.product else one_at_a_time(swept)
    probe = CopyProbe(device, args.copy_mebibytes)
    console = terminal.console()
    document: dict[str, Any] = {"format": 1, "machine": machine.describe(device)}
    for key in ("sweep", "together"):
        document[key] = {"results": [], "ranking": []}

    def measure_sets(key: str, settings: Sequence[Setting], seconds: float, title: str) -> list[Result]:
        found: list[Result] = []
        for model in args.sets:
            found += measure_set(model, settings, device, seconds, probe)
            document[key] = {"results": [asdict(result) for result in found], "ranking": ranking(found)}
            documents.write(args.out, document)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        console.print(table(ranking(found), title))
        return found

    title = "AGR-AdamW: time, ratio to the default setting, share of the copy bandwidth"
    best = best_together(measure_sets("sweep", settings, args.seconds, title))
    if len(best) > 1:
        measure_sets("together", [DEFAULT, best], args.seconds / 3, "The best values together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
