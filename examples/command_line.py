"""The command-line options that the examples share, and their checks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from common import STATE_DTYPES, VARIANTS, backend_name

import agr_cuda


def whole(minimum: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that are at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return value

    return parse


def number(*, minimum: float = 0.0, maximum: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a parser of finite numbers from `minimum` (excluded if `above`) to `maximum`."""
    allowed = f"{'above' if above else 'of at least'} {minimum:g}"
    if maximum < math.inf:
        allowed += f" and at most {maximum:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        in_range = minimum <= value <= maximum and not (above and value == minimum)
        if not (math.isfinite(value) and in_range):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {allowed}")
        return value

    return parse


def device(text: str) -> torch.device:
    """Parse the name of an available device."""
    try:
        chosen = torch.device(text)
        torch.zeros(1, device=chosen).item()  # A device that PyTorch knows may be missing in this machine.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is no device that is there ({reason})") from None
    return chosen


def device_option(description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of --device only. It is parsed first if the defaults of other options depend on it."""
    parser = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, metavar="NAME", default=found, help="where to train: cpu, cuda, cuda:1, ..."
    )
    return parser


def add_optimizer_options(
    parser: argparse.ArgumentParser, *, adamw_lr: float, adan_lr: float, weight_decay: float, warmup: float
) -> None:
    """Add the options on the optimizers and their learning rate schedule."""
    group = parser.add_argument_group("optimizers")
    group.add_argument(
        "--optimizers",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"which to train side by side, of {', '.join(VARIANTS)}",
    )
    group.add_argument(
        "--adamw-lr",
        metavar="X",
        type=number(above=True),
        default=adamw_lr,
        help="peak learning rate of AdamW and AGR-AdamW",
    )
    group.add_argument(
        "--adan-lr",
        metavar="X",
        type=number(above=True),
        default=adan_lr,
        help="peak learning rate of Adan and AGR-Adan",
    )
    group.add_argument(
        "--weight-decay",
        metavar="X",
        type=number(),
        default=weight_decay,
        help="weight decay, of matrices and kernels alone",
    )
    group.add_argument(
        "--max-grad-norm",
        metavar="X",
        type=number(),
        default=1.0,
        help="clip gradients to this global norm; 0 does not clip",
    )
    group.add_argument(
        "--warmup",
        metavar="SHARE",
        type=number(maximum=1.0),
        default=warmup,
        help="share of the steps in which the learning rate rises; it then falls along a cosine to a tenth",
    )
    group.add_argument(
        "--backend",
        choices=("auto", "cuda", "triton", "cpu", "reference"),
        default="auto",
        help="which implementation makes the step; auto takes the fastest one for the device",
    )
    group.add_argument(
        "--state-dtype",
        choices=STATE_DTYPES,
        default="float32",
        help="type of the optimizers' averages",
    )


def add_machine_options(parser: argparse.ArgumentParser, *, output: str, seed_help: str) -> None:
    """Add the options on seed, threads and output folder."""
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help=seed_help)
    # The default is one thread. Models this small gain little from a second thread on an idle machine and lose much on
    # a busy one, where a thread that spins while it waits may occupy the core that the other thread needs.
    parser.add_argument(
        "--threads", metavar="N", type=whole(1), default=1, help="CPU threads of PyTorch; more suit larger models"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="DIR",
        help="folder for the picture and results.json",
    )


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check what argparse cannot, set the number of threads and make the output folder; exit on an invalid option."""
    options.optimizers = list(dict.fromkeys(options.optimizers))  # without duplicates
    probe = torch.zeros(2, device=options.device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        agr_cuda.AdamW([probe], backend=backend_name(options)).step()
    except (RuntimeError, ValueError) as error:
        parser.error(f"argument --backend: {error}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot make the folder {str(options.output)!r}: {error.strerror}")
    torch.set_num_threads(options.threads)
