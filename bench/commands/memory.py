"""Count the bytes of parameters, gradients and optimizer state, and what a step allocates: ours beside the peers'.

One after the other, every contender gets parameters and gradients of its own and takes two steps. Its state is what is
held between the two besides these: whatever its constructor and its first step have made and kept, master weights
included. A step is what the second allocates on top, at its peak. The peak is the most that is held at any time, in the
first step too. bench/measuring/memory.py says how bytes are counted.

The column "rule" is what the averages and masters of a format take by arithmetic: what the state of agr_cuda's
optimizers must be, but for a few bytes a tensor, and that of others if they keep the same. agr_cuda's are judged by it
on sets of 100M elements and more, since tensors of less than 4,096 elements have no codes of 8 bits.

Contenders with formats of their own (docs/precision.md) are among them; those without store their numbers as --dtype
says. Writes memory-DEVICE-TAG.json into the output folder, anew after each set. Exit code 0, or 1 if an installed
contender failed, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.commands import options
from bench.measuring import machine, memory
from bench.reporting import documents, tables, terminal, units
from bench.reporting.results import Status
from bench.reporting.targets import LARGE_MODEL, Target
from bench.workloads import contenders
from bench.workloads.building import Step, eps_for, why_unmeasured
from bench.workloads.contenders import Contender
from bench.workloads.shapes import ModelSet
from bench.workloads.tensors import DEFAULT_GRADIENT_SCALE, PARAMETER_SCALE

DEFAULT_SETS = ("gpt2", "321x64")
STEPS = 2  # the last is what is called a step: by then all state is there
MOST_OF_RULE = 1.01  # of the arithmetic's bytes of state: step counts, and tensors too small for codes
MOST_OF_A_STEP = 0.01  # bytes an element


@dataclass(frozen=True)
class Held:
    """Bytes of one contender's training."""

    parameters: int
    gradients: int
    state: int
    step: int  # on top of these, at the peak of a step
    peak: int  # of all together, in any step
    rule: float  # of the state, by arithmetic


@dataclass(frozen=True)
class Row:
    """One contender on one model set."""

    set: str
    elements: int
    name: str
    label: str
    ours: bool
    status: Status
    reason: str  # why it was not measured
    held: Held | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    options.add_sets(parser, DEFAULT_SETS)
    options.add_contenders(parser, "all, those with formats of their own too")
    options.add_arguments(parser)


def state_by_arithmetic(contender: Contender, dtype: torch.dtype) -> float:
    """Return the bytes of an element's averages, and of its float32 master where there is one."""
    return contender.stored(dtype).state_bytes(contender.rule)


class Training:
    """The actions of a contender's training, for a meter to run."""

    def __init__(self, contender: Contender, model: ModelSet, device: torch.device, dtype: torch.dtype) -> None:
        self.contender, self.model, self.device = contender, model, device
        self.dtype = contender.stored(dtype).parameter
        self.parameters: list[torch.nn.Parameter] = []
        self.step: Step

    @property
    def actions(self) -> list[Callable[[], object]]:
        """Make parameters, give them gradients, build the optimizer, take STEPS steps."""
        return [self.make_parameters, self.make_gradients, self.build, *[lambda: self.step()] * STEPS]

    def make_parameters(self) -> None:
        """Make parameters of the model's shapes, all of one value: what is counted does not depend on it."""
        for shape in self.model.shapes:
            value = torch.full(shape, PARAMETER_SCALE, device=self.device, dtype=self.dtype)
            self.parameters.append(torch.nn.Parameter(value))

    def make_gradients(self) -> None:
        """Give each parameter a gradient of its type."""
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, DEFAULT_GRADIENT_SCALE)

    def build(self) -> None:
        """Build the optimizer."""
        self.step = self.contender.build(self.parameters, eps_for(self.dtype))


def measure(contender: Contender, model: ModelSet, device: torch.device, dtype: torch.dtype) -> Row:
    """Count a contender's bytes on one model set."""
    about = (model.name, model.elements, contender.name, contender.label, contender.ours)
    training = Training(contender, model, device, dtype)
    try:
        parameters, gradients, *built = memory.meter_for(device)(training.actions)
    except Exception as error:  # one contender's failure must not cost the others' figures
        return Row(*about, *why_unmeasured(error), None)
    finally:
        del training
        gc.collect()
    last, peak = built[-1], max(phase.peak for phase in built)
    state, step = last.before - gradients.after, last.peak - last.before
    rule = state_by_arithmetic(contender, dtype) * model.elements
    held = Held(parameters.after, gradients.after - parameters.after, state, step, peak, rule)
    return Row(*about, "measured", "", held)


def judge(rows: Sequence[Row], model: ModelSet) -> list[Target]:
    """Return the targets, which are stated for large models and agr_cuda's own backends."""
    if model.elements < LARGE_MODEL:
        return []
    found = [row.held for row in rows if row.held and row.ours and not row.name.startswith("reference")]
    of_rule = [held.state / held.rule for held in found if held.rule]
    of_steps = [held.step / model.elements for held in found]
    text = f"agr_cuda, {model.title}, the largest of all rows"
    return [
        Target(f"{text}: state, of the arithmetic's", MOST_OF_RULE, max(of_rule, default=None)),
        Target(
            f"{text}: bytes an element that a step allocates", MOST_OF_A_STEP, max(of_steps, default=None), unit="B"
        ),
    ]


def table(rows: Sequence[Row], model: ModelSet, title: str) -> terminal.Table:
    """Return a row a contender: bytes an element, and all together in GiB."""
    numbers = ("parameters", "gradients", "state", "rule", "step", "peak", "in all")
    about = f"{model.title}, {model.elements:,} elements in {len(model.shapes)} tensors; {title}"
    made = terminal.table(f"Bytes an element: {about}", ["contender"], numbers)
    for row in rows:
        if row.held is None:
            made.add_row(row.label, row.status, style="dim")
            continue
        held = row.held
        counts = (held.parameters, held.gradients, held.state, held.rule, held.step, held.peak)
        cells = [f"{count / model.elements:.4g}" for count in counts]
        made.add_row(row.label, *cells, units.size(held.peak), style="bold" if row.ours else None)
    return made


LEGEND = """\
state: what is kept from step to step, masters included. rule: the same by arithmetic, for the averages and masters of
  the format. step: what a step allocates on top, at its peak. peak: the most at any time, in the first step too."""


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 1 if an installed contender failed, else 0."""
    options.heed(args)
    console = terminal.console()
    description = machine.describe(args.device)
    choice = contenders.choose(args.device.type, args.contenders, contenders.BY_NAME)
    for line in tables.left_out(choice):
        console.print(line, highlight=False, markup=False)
    title = f"{description['device_name']}, {args.dtype} but for formats, torch {torch.__version__}"
    about = {"format": 1, "machine": description, "left_out": choice.left_out}
    rows: list[Row] = []
    judged: list[Target] = []
    for model in args.sets:
        found = [measure(entry, model, args.device, options.DTYPES[args.dtype]) for entry in choice.entries]
        console.print(table(found, model, title))
        for row in found:
            if row.held is None:
                console.print(f"{row.label}: {row.reason}", highlight=False, markup=False)
        rows += found
        judged += judge(found, model)
        path = documents.write_run("memory", args, about, ("dtype", "tag"), rows, judged)
    console.print(LEGEND, highlight=False)
    if judged:
        console.print(tables.targets_table(judged))
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return int(any(row.status == "failed" for row in rows))
