"""Time backward pass and step where gradients are released: parameters are updated in the backward pass, one by one.

That frees each gradient at once, and costs the host a launch for each tensor instead of one for all. Optimizers have
small tensors of their own, whose backward pass is next to nothing, and take turns in shuffled order. On a GPU, the
host's time is measured, from an idle device on.

Writes release-DEVICE-TAG.json into the output folder. Exit code 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

import agr_cuda
from bench.commands import options
from bench.measuring import clocks, machine, races
from bench.measuring.races import Lane
from bench.measuring.stats import Summary, paired_ratios, summarize
from bench.reporting import documents, terminal, units
from bench.workloads.building import LEARNING_RATE

UNTIMED = 3  # steps at first
UNIT = "agr_cuda AdamW, ordinary"
# Makes of a model's optimizer what is to be called after the backward pass.
Make = Callable[[nn.Module], Callable[[], object]]


class Tensors(nn.Module):
    """A model of tensors of one size."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        like = {"device": args.device, "dtype": options.DTYPES[args.dtype]}
        self.tensors = nn.ParameterList(torch.randn(args.elements, **like) for _ in range(args.tensors))
        self.weights = torch.randn(args.tensors * args.elements, **like)

    def backward(self) -> None:
        """Give every tensor a gradient."""
        torch.autograd.backward(torch.cat([*self.tensors]), self.weights)


def ordinary(model: nn.Module) -> Callable[[], object]:
    """Take one step for all tensors."""
    optimizer = agr_cuda.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def released(model: nn.Module) -> Callable[[], object]:
    """Release the gradients of the same optimizer: what is left of its step is its end."""
    optimizer = agr_cuda.AdamW(model.parameters(), lr=LEARNING_RATE)
    agr_cuda.release_gradients(model, optimizer)
    return optimizer.step


def optimi_released(model: nn.Module) -> Callable[[], object]:
    """Release gradients in the way of optimi, whose step does nothing then."""
    optimi = import_module("optimi")
    optimizer = optimi.AdamW(model.parameters(), lr=LEARNING_RATE, gradient_release=True)
    optimi.prepare_for_gradient_release(model, optimizer)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_hooks(model: nn.Module) -> Callable[[], object]:
    """Make one of PyTorch's optimizers for each parameter, in its hook, as PyTorch's tutorial does."""

    def hook_of(optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return hook

    for parameter in model.parameters():
        optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, fused=True)
        hooked: Any = parameter  # PyTorch declares no types for it
        hooked.register_post_accumulate_grad_hook(hook_of(optimizer))
    return lambda: None


CONTENDERS: dict[str, Make] = {
    "agr_cuda AdamW, released": released,
    "optimi AdamW, prepare_for_gradient_release": optimi_released,
    "torch AdamW, fused, one for each parameter in hooks": in_hooks,
    UNIT: ordinary,
}


@dataclass(frozen=True)
class Row:
    """What was measured of an optimizer."""

    label: str
    host_s: Summary  # backward pass and step; on a CPU that is all of it
    ratio: Summary  # to agr_cuda's ordinary step in the same round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    counts = {
        "tensors": (321, "tensors"),
        "elements": (64, "elements of a tensor"),
        "steps": (100, "timed steps of each optimizer"),
    }
    options.add_counts(parser, counts)
    options.add_arguments(parser, threads=1)


def lane(label: str, make: Make, args: argparse.Namespace) -> Lane:
    """Return an optimizer's backward pass and step, on tensors of its own."""
    model = Tensors(args)
    step = make(model)

    def backward_and_step() -> None:
        model.backward()
        step()

    return Lane(label, backward_and_step)


def measure(args: argparse.Namespace) -> list[Row]:
    """Time all contenders."""
    lanes = [lane(label, make, args) for label, make in CONTENDERS.items()]
    clock = clocks.host_clock_for(args.device)
    for rounds in (UNTIMED, args.steps):
        timings = races.race(lanes, clock, rounds=rounds, seconds=float("inf"), new_round=lambda _: None)
    hosts = {label: [timing.host for timing in found] for label, found in timings.items()}
    return [Row(label, summarize(times), paired_ratios(times, hosts[UNIT])) for label, times in hosts.items()]


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 0."""
    options.heed(args)
    console = terminal.console()
    description = machine.describe(args.device)
    rows = measure(args)
    title = f"{description['device_name']}, torch {torch.__version__}: {args.tensors} tensors of {args.elements}"
    numbers = ("backward and step", "quartiles", "steps", "of ordinary")
    made = terminal.table(f"Gradient release: {title}", ["optimizer"], numbers)
    for row in rows:
        times = (units.duration(row.host_s.median), units.span(row.host_s), str(row.host_s.count))
        style = "bold" if row.label.startswith("agr") else None
        made.add_row(row.label, *times, units.times(row.ratio.median), style=style)
    console.print(made)
    settings = ("tensors", "elements", "steps", "dtype", "tag")
    path = documents.write_run("release", args, {"format": 1, "machine": description}, settings, rows, [])
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0
