"""Predict a step's time on GPUs, by replaying its tickets with latencies, caches and DRAM's channels. Needs no GPU.

Where `traffic` counts bytes, this counts nanoseconds: what blocks wait for one after the other, how much is in flight
meanwhile, and how long it queues. bench/time_model says what is modelled and what is not: gpu.py has the GPUs and the
sources of their figures, code.py what the kernel's code costs. These are predictions, which nobody has measured. Trust
differences of more than 2%; a share above 100% of a copy means as fast as a copy.

Kernels: 0.1.0, whose blocks release and acquire sums; words, today's, whose sums are words that carry the epoch.

Writes latency-DTYPE-TAG.json into the output folder. Exit code 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch

from bench.commands import options
from bench.measuring import machine
from bench.reporting import documents
from bench.reporting.terminal import Console, Table, console, table
from bench.reporting.units import duration, percent
from bench.time_model.code import KERNELS
from bench.time_model.gpu import GPUS
from bench.time_model.memory import Fit, copy_bandwidth, misfit, stream_fits
from bench.time_model.prediction import UNCHANGED, Prediction, Steps
from bench.workloads.shapes import DEFAULT_SETS

DTYPES = ("float32", "bfloat16", "float16")  # for which code.py has cycles
RULES = ("AdamW", "Adan")  # for which it has those of updates
DEFAULT_GPUS = ("h100", "h200", "b200", "rtx4090")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    options.add_sets(parser, DEFAULT_SETS)
    several: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "gpus": (tuple(GPUS), DEFAULT_GPUS),
        "rules": (RULES, RULES),
        "kernels": (tuple(KERNELS), tuple(KERNELS)),
    }
    for name, (allowed, default) in several.items():
        text, metavar = f"{', '.join(allowed)} (default: {' '.join(default)})", name[:-1].upper()
        parser.add_argument(f"--{name}", nargs="+", choices=allowed, default=default, metavar=metavar, help=text)
    parser.add_argument("--clip", action="store_true", help="gradients are clipped by their norm")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--changes",
        action="store_true",
        help="of the change from 0.1.0 to words each part alone, then all, then what else might be changed",
    )
    asked.add_argument("--sensitivity", action="store_true", help="what the guesses among the figures decide")
    asked.add_argument(
        "--check-memory", action="store_true", help="compare the model of DRAM with published measurements, and end"
    )
    options.add_dtype(parser, DTYPES)
    options.add_output(parser)


def figures_table(predictions: Iterable[Prediction], title: str) -> Table:
    """Return a row a prediction; kernels are compared with the first of their GPU, model and rule."""
    columns = ("step", "ratio", "of copy", "with launch", "bytes", "ideal", "hits", "waited")
    made = table(title, ["GPU", "model", "rule", "kernel"], columns)
    first: dict[tuple[str, str, str], float] = {}
    for prediction in predictions:
        found, gpu, rule = prediction.outcome, prediction.gpu, prediction.code.rule
        base = first.setdefault((gpu.title, prediction.model.name, rule), found.ns)
        made.add_row(
            gpu.title,
            prediction.model.title,
            rule,
            prediction.kernel,
            duration(found.ns * 1e-9),
            f"{found.ns / base:.3f}",
            percent(found.share_of_copy(gpu)),
            percent(found.share_of_copy(gpu, launch=True)),
            f"{found.total:.2f}",
            f"{found.ideal_bytes / found.elements:g}",
            *map(percent, (found.hit_share, found.waited)),
        )
    return made


def variants_table(predictions: Iterable[Prediction], what: str, of: str) -> Table:
    """Return a row a variant, compared with what is as it is, of the same kernel."""
    made = table(of, ["kernel", what], ("step", "difference", "of copy", "bytes", "hits", "waited"))
    base: dict[str, float] = {}
    for prediction in predictions:
        found = prediction.outcome
        if prediction.variant == UNCHANGED:
            base[prediction.kernel] = found.ns
        made.add_row(
            prediction.kernel,
            prediction.variant,
            duration(found.ns * 1e-9),
            "" if prediction.variant == UNCHANGED else f"{100 * (found.ns / base[prediction.kernel] - 1):+.1f}%",
            percent(found.share_of_copy(prediction.gpu)),
            f"{found.total:.2f}",
            *map(percent, (found.hit_share, found.waited)),
            style="bold" if prediction.variant == UNCHANGED else None,
        )
    return made


def fits_table(fits: Iterable[Fit]) -> Table:
    """Return the STREAM kernels, in the model and measured."""
    made = table("STREAM on a GH200, GB/s", ["kernel"], ("threads", "measured", "model"))
    for fit in fits:
        made.add_row(fit.kernel, str(fit.threads), f"{fit.measured:.0f}", f"{fit.modelled:.0f}")
    return made


def check_memory(terminal: Console) -> None:
    """Print the model of DRAM beside measurements."""
    fits = stream_fits()
    terminal.print(fits_table(fits))
    terminal.print(f"The model is off by {percent(misfit(fits))} (root of the mean square).", highlight=False)
    for gpu in GPUS.values():
        line = f"{gpu.title}: a copy with 64 KB in flight makes {copy_bandwidth(gpu):.0f} of {gpu.copy:.0f} GB/s"
        terminal.print(line, highlight=False)


LEGEND = """\
ratio: the time over that of the first kernel. of copy: what the rule must move (ideal) over the time, as a share of a
  copy's bandwidth; with launch: a launch in a stream counted too.
bytes: by DRAM, for an element. hits: share of the second reads of gradients that DRAM is spared. waited: share of the
  blocks' time spent waiting for sums, which costs nothing as long as others keep DRAM busy."""


def run(args: argparse.Namespace) -> int:
    """Print the predictions and write them as JSON."""
    terminal = console()
    if args.check_memory:
        check_memory(terminal)
        return 0
    steps = Steps(options.DTYPES[args.dtype], clips=args.clip)
    suffix = f", {args.dtype}{', clipped' if args.clip else ''}"
    asked = list(product(map(GPUS.__getitem__, args.gpus), args.sets, args.rules))
    found: list[Prediction] = []
    for gpu, model, rule in asked:
        title = f"{gpu.title}, {model.title}, {rule}{suffix}"
        if args.changes:
            several = list(steps.changes(gpu, model, rule))
            terminal.print(variants_table(several, "change", title))
            found += several
        elif args.sensitivity:
            several = [variant for kernel in args.kernels for variant in steps.sensitivity(gpu, model, rule, kernel)]
            terminal.print(variants_table(several, "guess", title))
            found += several
        else:
            found += [steps.predict(gpu, model, rule, kernel) for kernel in args.kernels]
    if not args.changes and not args.sensitivity:
        terminal.print(figures_table(found, f"Predicted time of a step{suffix}"))
    terminal.print(LEGEND, highlight=False)

    names = ("dtype", "clip", "gpus", "rules", "kernels", "changes", "sensitivity", "tag")
    document = {
        "format": 1,
        "machine": machine.describe(torch.device("cpu")),
        "settings": {name: getattr(args, name) for name in names},
        "predictions": [prediction.record() for prediction in found],
    }
    path: Path = args.out / f"latency-{args.dtype}-{args.tag}.json"
    documents.write(path, document)
    terminal.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0
