"""Time step() of parameters that are spread over processes, as FSDP2 leaves them: DTensors, of which each has a part.

Processes on this machine make one gloo group (nccl on GPUs, one each). Every optimizer has DTensors, or plain tensors
of the size of their parts, and gradients of its own; they take turns step by step in the same shuffled order in all
processes, which wait for each other before every step. What is timed is the first process's step(), the all-reduce of
the sums that AGR and clipping need included. On GPUs that is the host's time.

Writes sharded-DEVICE-TAG.json into the output folder. Exit code 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import agr_cuda
from bench.commands import options
from bench.measuring import clocks, machine, races
from bench.measuring.races import Lane
from bench.measuring.stats import Summary, paired_ratios, summarize
from bench.reporting import documents, tables, terminal, units
from bench.reporting.targets import Target, stated_for

UNTIMED = 10  # steps at first
UNIT = "torch AdamW, fused"
PLAIN = "agr_cuda AdamW without AGR, plain tensors"
WITHOUT = "agr_cuda AdamW without AGR"
MOST_OF_FUSED, MOST_OF_PLAIN = 0.5, 3.0

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
#: Whether each has plain tensors, and how it is made.
CONTENDERS: dict[str, tuple[bool, Make]] = {
    UNIT: (False, lambda ps: torch.optim.AdamW(ps, fused=True)),
    "torch AdamW, default": (False, lambda ps: torch.optim.AdamW(ps)),
    "agr_cuda AdamW": (False, lambda ps: agr_cuda.AdamW(ps)),
    "agr_cuda AdamW, clipping": (False, lambda ps: agr_cuda.AdamW(ps, max_grad_norm=1.0)),
    "agr_cuda Adan": (False, lambda ps: agr_cuda.Adan(ps)),
    WITHOUT: (False, lambda ps: agr_cuda.AdamW(ps, agr=False)),
    PLAIN: (True, lambda ps: agr_cuda.AdamW(ps, agr=False)),
}


@dataclass(frozen=True)
class Row:
    """What was measured of an optimizer."""

    label: str
    host_s: Summary  # a step of the first process
    ratio: Summary  # to torch's fused AdamW's in the same round
    of_plain: Summary  # to our own step of plain tensors without AGR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    counts = {
        "processes": (2, "processes"),
        "tensors": (321, "tensors"),
        "elements": (64, "elements of a tensor, over all processes"),
        "steps": (200, "timed steps of each optimizer"),
    }
    options.add_counts(parser, counts)
    options.add_arguments(parser, threads=1)


def _optimizer(mesh: Any, plain: bool, make: Make, args: argparse.Namespace) -> torch.optim.Optimizer:
    dtype, size = options.DTYPES[args.dtype], args.elements
    if plain:
        size = -(-size // args.processes)

    def tensor() -> torch.Tensor:
        value = torch.randn(size, device=mesh.device_type).to(dtype)
        return value if plain else distribute_tensor(value, mesh, [Shard(0)])

    parameters = [torch.nn.Parameter(tensor()) for _ in range(args.tensors)]
    for parameter in parameters:
        parameter.grad = tensor()
    return make(parameters)


def _measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Time all contenders in one of the processes; the first stores the times."""
    torch.set_num_threads(args.threads or 1)
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=store, rank=rank, world_size=args.processes)
    mesh = init_device_mesh(args.device.type, (args.processes,))
    lanes = [
        Lane(label, _optimizer(mesh, plain, make, args).step, before=dist.barrier)
        for label, (plain, make) in CONTENDERS.items()
    ]
    clock = clocks.host_clock_for(args.device)
    # By numbers of steps, since processes that stopped by the clock would leave others waiting.
    for rounds in (UNTIMED, args.steps):
        timings = races.race(lanes, clock, rounds=rounds, seconds=inf, new_round=lambda _: None)
    if rank == 0:
        hosts = {label: [timing.host for timing in rounds] for label, rounds in timings.items()}
        torch.save(hosts, f"{folder}/hosts")
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> list[Row]:
    """Time all contenders in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_measure, (args, folder), nprocs=args.processes)  # type: ignore[attr-defined, no-untyped-call]
        hosts: dict[str, list[float]] = torch.load(Path(folder) / "hosts")
    return [
        Row(label, summarize(times), paired_ratios(times, hosts[UNIT]), paired_ratios(times, hosts[PLAIN]))
        for label, times in hosts.items()
    ]


def judge(rows: list[Row]) -> list[Target]:
    """Return the targets, which are stated for 321 small float32 tensors."""
    by_label = {row.label: row for row in rows}
    regularized = [row for row in rows if row.label.startswith("agr_cuda") and row.label not in (WITHOUT, PLAIN)]
    return [
        *(
            Target(f"{row.label}, sharded, against torch's fused AdamW", MOST_OF_FUSED, row.ratio.median)
            for row in regularized
        ),
        Target(f"{WITHOUT}, sharded, against plain tensors", MOST_OF_PLAIN, by_label[WITHOUT].of_plain.median),
    ]


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. Returns 0."""
    options.heed(args)
    console = terminal.console()
    description = machine.describe(args.device)
    rows = measure(args)
    what = f"{args.processes} processes: {args.tensors} tensors of {args.elements}"
    title = f"{description['device_name']}, torch {torch.__version__}, {what}"
    made = terminal.table(
        f"step() of sharded parameters: {title}",
        ["optimizer"],
        ("step()", "quartiles", "steps", "of torch's fused", "of plain"),
    )
    for row in rows:
        host = row.host_s
        times = (units.duration(host.median), units.span(host), str(host.count))
        ratios = units.times(row.ratio.median), units.times(row.of_plain.median)
        made.add_row(row.label, *times, *ratios, style="bold" if row.label.startswith("agr") else None)
    console.print(made)
    judged = judge(rows) if stated_for(args.tensors, args.elements, args.dtype) and args.processes == 2 else []
    if judged:
        console.print(tables.targets_table(judged))
    settings = ("processes", "tensors", "elements", "steps", "dtype", "tag")
    path = documents.write_run("sharded", args, {"format": 1, "machine": description}, settings, rows, judged)
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0
