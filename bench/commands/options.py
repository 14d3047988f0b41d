"""Command-line options that commands share: sets, counts, device, dtype, threads, output."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench.workloads.contenders import BY_NAME, contender
from bench.workloads.shapes import ALLOWED_SETS, model_set

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def device(text: str) -> torch.device:
    """Parse cpu, or a CUDA device that is there."""
    if text == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}: allowed are cpu, cuda and cuda:INDEX")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = torch.device(text if ":" in text else "cuda:0")
    if chosen.index >= count:
        raise argparse.ArgumentTypeError(f"device {text!r} is not there: PyTorch finds {count} CUDA devices")
    return chosen


def natural_int(text: str) -> int:
    """Parse an integer of at least 0."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def file_tag(text: str) -> str:
    """Parse a part of a file name."""
    if not re.fullmatch(r"[\w.+-]+", text):
        raise argparse.ArgumentTypeError(f"tag {text!r} may hold letters, digits, '.', '_', '+' and '-' alone")
    return text


def key_of(what: str, allowed: Collection[str]) -> Callable[[str], str]:
    """Return a parser of one of these names; `what` says of what they are."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}: allowed are {', '.join(allowed)}")
        return text

    return parse


def named(find: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that passes on the message of the ValueError that `find` raises."""

    def parse(text: str) -> Any:
        try:
            return find(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def add_sets(parser: argparse.ArgumentParser, default: Sequence[str], allowed: str = ALLOWED_SETS) -> None:
    """Add --sets, with these by default."""
    parser.add_argument(
        "--sets",
        nargs="+",
        metavar="SET",
        type=named(model_set),
        default=[*map(model_set, default)],
        help=f"model sets: {allowed} (default: {' '.join(default)})",
    )


def add_contenders(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --contenders, None by default; `default` says what that stands for."""
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        type=named(contender),
        help=f"optimizers, of {', '.join(BY_NAME)} (default: {default})",
    )


def add_counts(parser: argparse.ArgumentParser, counts: Mapping[str, tuple[int, str]]) -> None:
    """Add options that take a count: by name the default and what is counted."""
    for name, (default, what) in counts.items():
        text = f"{what} (default: {default})"
        parser.add_argument(f"--{name}", type=positive_int, default=default, metavar="COUNT", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="DEVICE",
        help="cpu, cuda or cuda:INDEX (default: cuda where PyTorch finds a GPU, else cpu)",
    )


def add_dtype(parser: argparse.ArgumentParser, allowed: Collection[str] = DTYPES) -> None:
    """Add --dtype, one of the allowed ones."""
    parser.add_argument(
        "--dtype",
        choices=allowed,
        default="float32",
        help="storage type of parameters, gradients and state (default: float32)",
    )


def add_output(parser: argparse.ArgumentParser, no_tag: str | None = None) -> None:
    """Add --out and --tag: where files go and what they are called. `no_tag` says what a tag of None means."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="FOLDER",
        help="folder of the files that are written, made if missing (default: runs/bench)",
    )
    parser.add_argument(
        "--tag",
        type=file_tag,
        default=None if no_tag else datetime.now().strftime("%Y%m%d-%H%M%S"),
        metavar="TEXT",
        help=f"end of the output files' names{no_tag or '; an equal one overwrites (default: date and time)'}",
    )


def add_arguments(parser: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Add --device, --dtype, --threads (by default this many, or PyTorch's choice), --out and --tag."""
    add_device(parser)
    add_dtype(parser)
    default = threads or f"PyTorch's choice, here {torch.get_num_threads()}"
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=threads,
        metavar="COUNT",
        help=f"PyTorch's number of CPU threads (default: {default})",
    )
    add_output(parser)


def heed(args: argparse.Namespace) -> None:
    """Make --threads and --device PyTorch's own."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
