"""Predict DRAM's bytes an element on a GPU, by replaying schedules through a model of its cache. Needs no GPU.

AGR needs a tensor's abs-sum before its first element can be updated, so that every gradient is read twice. What the
schedule is for is that the second read finds the gradient in the cache. This says how often it does, what share of
DRAM's bandwidth a step can reach therefore, and how long blocks wait for an abs-sum. bench/cache_model/replay.py says
what is modelled and what is not.

On a GPU, ncu's dram__bytes_read.sum and dram__bytes_write.sum over the elements are what "read" and "written" predict.
A share of 0.5 of the cache stands for GPUs whose cache is two partitions, each of which may hold a copy of a line
(A100, H100, H200).

Writes traffic-DTYPE-TAG.json into the output folder. Exit code 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from bench.cache_model.prediction import H200, SWEPT_LEADS, SWEPT_WINDOWS, Limits, Prediction, Predictor, best_of
from bench.commands import options
from bench.measuring import machine
from bench.reporting import documents
from bench.reporting.terminal import Console, Table, console, table
from bench.reporting.units import percent
from bench.workloads.formats import FORMATS
from bench.workloads.shapes import MODELS, ModelSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    natural, positive = options.natural_int, options.positive_int
    options.add_sets(parser, tuple(MODELS), f"{' '.join(MODELS)}, or COUNTxELEMENTS such as 321x4096")
    window = "gradient that waits for its UPDATE (default: the cuda backend's share of --l2)"
    lead = "gradient of other tasks between a tensor's last REDUCE and first UPDATE (default: a chunk for each block)"
    on_chip = (
        "also keep this much of the end of every gradient above the window in shared memory, and say what that saves"
    )
    sizes = {
        "l2": (positive, int(H200.cache_bytes), "BYTES", "the cache's nominal size (default: %(default)s, an H200's)"),
        "blocks": (positive, None, "COUNT", "blocks that run at once (default: the cuda backend's, on an H200)"),
        "chunk": (positive, None, "ELEMENTS", "elements of a chunk (default: the cuda backend's)"),
        "window": (natural, None, "BYTES", window),
        "lead": (natural, None, "BYTES", lead),
        "on-chip": (natural, 0, "BYTES", f"{on_chip}; an H200 has room for 27033600 (default: 0)"),
    }
    for name, (kind, default, metavar, text) in sizes.items():
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    parser.add_argument(
        "--share",
        nargs="+",
        type=options.positive_float,
        default=[1.0, 0.5],
        metavar="SHARE",
        help="effective shares of the cache's nominal size, each gets its rows (default: 1.0 0.5)",
    )
    parser.add_argument(
        "--no-hints", action="store_true", help="the cache keeps what was used last, whatever a task asks it to keep"
    )
    parser.add_argument("--sweep", action="store_true", help="also try windows and leads, and say which are best")
    parser.add_argument(
        *("--dtype", "--precision"),
        choices=FORMATS,
        default="float32",
        metavar="FORMAT",
        help="as what numbers are stored (docs/precision.md): parameters, gradients and state in one type, or in those "
        f"that a name tells; of {', '.join(FORMATS)} (default: float32)",
    )
    options.add_output(parser)


def mebibytes(size: float) -> str:
    """Return a size with two digits after the point at most."""
    return f"{size / 2**20:.2f}".rstrip("0").rstrip(".") + " MiB"


def figures_table(predictions: Sequence[Prediction], title: str) -> Table:
    """Return a row a prediction; what is kept on chip is compared with the row before."""
    with_kept = any(prediction.on_chip_bytes for prediction in predictions)
    columns = ["cache", *(["on chip"] if with_kept else []), "ideal", "read", "written", "total"]
    columns += [*(["saved"] if with_kept else []), "ceiling", "hits", "waited", "idle"]
    made = table(title, ["model", "rule"], columns)
    before: Prediction | None = None
    for prediction in predictions:
        found = prediction.traffic
        kept, saved = [mebibytes(prediction.on_chip_bytes)], [""]
        if prediction.on_chip_bytes and before:
            saved = [f"{before.traffic.total - found.total:.2f}"]
        made.add_row(
            prediction.model.title,
            prediction.rule,
            f"{prediction.share:g}",
            *(kept if with_kept else []),
            f"{found.ideal_bytes / found.elements:g}",
            *(f"{figure:.2f}" for figure in (found.read, found.written, found.total)),
            *(saved if with_kept else []),
            *map(percent, (found.ceiling, found.hit_share, found.waited, found.idle)),
        )
        before = prediction
    return made


def sweep_table(predictions: Sequence[Prediction]) -> Table:
    """Return windows down, leads across: reach, and in brackets bytes an element and the share of time waited."""
    first = predictions[0]
    best = best_of([prediction.traffic.reach for prediction in predictions])
    title = f"{first.model.title}, {first.rule}, share {first.share:g} of the cache: window down, lead across"
    leads = list(dict.fromkeys(prediction.limits.lead_bytes for prediction in predictions))
    made = table(title, [], ["", *map(mebibytes, leads)])
    for begin in range(0, len(predictions), len(leads)):
        cells = []
        for place in range(begin, begin + len(leads)):
            found = predictions[place].traffic
            text = f"{percent(found.reach)} ({found.total:.2f}, {percent(found.waited)})"
            cells.append(f"[bold]{text}[/]" if place == best else text)
        made.add_row(mebibytes(predictions[begin].limits.window_bytes), *cells)
    return made


def choice(label: str, limits: Limits, reach: float) -> str:
    """Return a line on the best limits."""
    where = f"window {mebibytes(limits.window_bytes)}, lead {mebibytes(limits.lead_bytes)}"
    return f"{label}: {where}: reaches {percent(reach)}"


def print_sweep(
    terminal: Console, predictor: Predictor, models: Sequence[ModelSet], shares: Sequence[float]
) -> list[Prediction]:
    """Try windows and leads on every model, and print which are best for each and for all together."""
    tried: list[Prediction] = []
    choices: list[str] = []
    for model, share in product(models, shares):
        terminal.print(f"Sweeping {model.title}, share {share:g} ...", highlight=False)
        found = predictor.sweep(model, share)
        tried += found
        terminal.print(sweep_table(found))
        reaches = [prediction.traffic.reach for prediction in found]
        best = best_of(reaches)
        choices.append(choice(f"{model.title}, share {share:g}", found[best].limits, reaches[best]))
    count = len(SWEPT_WINDOWS) * len(SWEPT_LEADS)
    runs = [tried[begin : begin + count] for begin in range(0, len(tried), count)]
    means = [fmean(run[place].traffic.reach for run in runs) for place in range(count)]
    best = best_of(means)
    choices.append(choice("All, on average", runs[0][best].limits, means[best]))
    for line in choices:
        terminal.print(line, highlight=False)
    return tried


LEGEND = """\
ideal, read, written, total: bytes an element, total by DRAM; ceiling: the ideal as a share of the total.
hits: share of the second reads of gradients that DRAM is spared.
waited, idle: shares of the blocks' time spent waiting for an abs-sum, and after the last ticket was drawn.
reach (sweep): the ceiling times the share of time not waited, which is what is left where nothing hides the waiting."""


def run(args: argparse.Namespace) -> int:
    """Print the predictions and write them as JSON."""
    terminal = console()
    predictor = Predictor(
        FORMATS[args.dtype],
        cache_bytes=args.l2,
        blocks=args.blocks,
        chunk_elements=args.chunk,
        window_bytes=args.window,
        lead_bytes=args.lead,
        on_chip_bytes=args.on_chip,
        hints=not args.no_hints,
    )
    limits = predictor.limits
    title = (
        f"Predicted traffic, {args.dtype}: cache {mebibytes(args.l2)}, {predictor.blocks} blocks, "
        f"chunks of {limits.chunk_elements:,}, window {mebibytes(limits.window_bytes)}, "
        f"lead {mebibytes(limits.lead_bytes)}"
    )
    found = [prediction for model in args.sets for prediction in predictor.figures(model, args.share)]
    terminal.print(figures_table(found, title))
    terminal.print(LEGEND, highlight=False)
    swept = print_sweep(terminal, predictor, args.sets, args.share) if args.sweep else []

    settings = {
        "dtype": args.dtype,
        "l2_bytes": args.l2,
        "blocks": predictor.blocks,
        "hints": not args.no_hints,
        "tag": args.tag,
    }
    document = {
        "format": 1,
        "machine": machine.describe(torch.device("cpu")),
        "settings": settings,
        "predictions": [prediction.record() for prediction in found],
        "sweep": [prediction.record() for prediction in swept],
    }
    path: Path = args.out / f"traffic-{args.dtype}-{args.tag}.json"
    documents.write(path, document)
    terminal.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0
