"""Sweep the tunables of the CUDA launch: `python -m bench.gpu_report.tune --out FILE.json`.

The cuda backend reads them from the environment when it lays a schedule: AGR_CUDA_CHUNK (elements of a chunk),
AGR_CUDA_WINDOW and AGR_CUDA_LEAD (bytes of gradient), AGR_CUDA_BLOCKS (blocks a multiprocessor), AGR_CUDA_PREFETCH
(bytes that updates of all blocks prefetch). First each is varied alone, then the best values of all are tried together;
with --product, all combinations of the values given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import geometric_mean

from bench.commands import options
from bench.gpu_report import variants
from bench.gpu_report.variants import Case, Comparison, Result, Row, Variables
from bench.reporting.units import duration, times

MIB = 2**20
SWEPT = {
    "chunk": (2048, 4096, 8192, 16384, 32768),
    "window": (4 * MIB, 8 * MIB, 12 * MIB, 16 * MIB, 24 * MIB, 32 * MIB),
    "lead": (0, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB),
    "blocks": (1, 2, 3, 4),
    "prefetch": (0, 3 * MIB, 12 * MIB, 24 * MIB, 48 * MIB),
}
IN_MIB = ("window", "lead", "prefetch")
SETS = ("gpt2", "vit-b-16", "llama-3.2-1b")
WORTH = 0.99  # of the default's time, on average over the sets: what a value must beat to be combined with others

Setting = Mapping[str, int]  # tunables that are not at their default
DEFAULT: Setting = {}


def variables(setting: Setting) -> Variables:
    """Return the environment of a setting, in which the other tunables are not set."""
    return {f"AGR_CUDA_{name.upper()}": str(setting[name]) if name in setting else None for name in SWEPT}


def label(setting: Setting) -> str:
    """Return how a setting is shown."""
    shown = {name: f"{value / MIB:g} MiB" if name in IN_MIB else str(value) for name, value in setting.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "default"


def one_at_a_time(swept: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Return the default and every value of every tunable alone."""
    return [DEFAULT, *({name: value} for name, values in swept.items() for value in values)]


def combinations(swept: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Return the default and every combination of values."""
    return [DEFAULT, *(dict(zip(swept, values, strict=True)) for values in product(*swept.values()))]


def averages(results: Sequence[Result]) -> dict[str, float]:
    """Return the geometric mean of each setting's ratios over the sets, the fastest first."""
    found = variants.by_variant(results)
    means = {name: geometric_mean([result.ratio.median for result in measured]) for name, measured in found.items()}
    return dict(sorted(means.items(), key=lambda pair: pair[1]))


def best_together(results: Sequence[Result], settings: Sequence[Setting]) -> Setting:
    """Return the best value of each tunable that is worth it."""
    alone = {label(setting): setting for setting in settings if len(setting) == 1}
    best: dict[str, int] = {}
    for name, mean in averages(results).items():
        if mean < WORTH and name in alone:
            for tunable, value in alone[name].items():
                best.setdefault(tunable, value)
    return best


def ranking(results: Sequence[Result]) -> list[Row]:
    """Return what is shown of each setting, the fastest on average first."""
    found = variants.by_variant(results)
    rows: list[Row] = []
    for name, mean in averages(results).items():
        cells = {
            result.case: f"{duration(result.step_s.median)} {times(result.ratio.median)} {result.share_of_copy:.0%}"
            for result in found[name]
        }
        rows.append({"variant": name, "cases": cells, "result": f"{mean:.3f}x"})
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report.tune", description=__doc__)
    variants.add_arguments(parser, seconds=6.0)
    options.add_sets(parser, SETS)
    for name, values in SWEPT.items():
        parser.add_argument(f"--{name}", nargs="*", type=options.natural_int, default=values, metavar="VALUE")
    parser.add_argument("--product", action="store_true", help="try all combinations of the values")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Sweep, print tables and write the figures as JSON."""
    args = build_parser().parse_args(arguments)
    swept = {name: tuple(getattr(args, name)) for name in SWEPT if getattr(args, name)}
    settings = combinations(swept) if args.product else one_at_a_time(swept)
    cases = [Case(model.name, model.name) for model in args.sets]
    comparison = Comparison(args, ("sweep", "together"))

    def measure(part: str, settings: Sequence[Setting], seconds: float, title: str) -> list[Result]:
        tried = {label(setting): variables(setting) for setting in settings}
        return comparison.measure(part, cases, tried, seconds, ranking, title)

    title = "AGR-AdamW: time, ratio to the default setting, share of the copy bandwidth; on average"
    best = best_together(measure("sweep", settings, args.seconds, title), settings)
    if len(best) > 1:
        measure("together", [DEFAULT, best], args.seconds / 3, "The best values together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
