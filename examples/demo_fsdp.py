"""Show that sharded training is unsharded training, through a killed process and another number of them.

Trains the same model twice with train_fsdp.py: on one process without sharding; and sharded, on some processes of
which one is killed in the middle of a step, and then from the last checkpoint on another number of processes.

Needs: pip install "agr-cuda[examples]"
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from command_line import whole
from report import start_picture
from rich.console import Console

SCRIPT = Path(__file__).with_name("train_fsdp.py")


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and those for train_fsdp.py."""
    on_gpu = torch.cuda.device_count() > 1
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Other options go to train_fsdp.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", metavar="N", type=whole(3), default=300, help="training steps")
    parser.add_argument("--processes", metavar="N", type=whole(2), default=2, help="processes of the killed run")
    parser.add_argument(
        "--resume-on", metavar="N", type=whole(1), default=1 if on_gpu else 4, help="and of the resumed"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="for all of them"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/fsdp"), metavar="DIR", help="folder, emptied first")
    return parser.parse_known_args(arguments)


def start(processes: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run train_fsdp.py on some processes, as torchrun does, and return how it ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(SCRIPT), *options, f"--output={folder}"], capture_output=True, text=True, check=False
    )


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step; of a step that was made twice, that of the second time."""
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def draw(folder: Path, unsharded: Sequence[float], sharded: Sequence[float], resumed: int) -> Path:
    """Draw both losses and their relative difference, and return the picture's path."""
    figure, (both, difference) = start_picture(
        "A GPT trained in one piece, and in parts",
        ("Training", "step", "loss (nats per byte)"),
        ("Relative difference of the losses", "step", "|sharded / unsharded - 1|"),
    )
    both.plot(unsharded, color="#56a8dd", linewidth=4.0, label="one process, unsharded")
    both.plot(sharded, color="#004c7f", linewidth=1.4, label="sharded, killed and resumed")
    apart = [abs(one / other - 1) for one, other in zip(sharded, unsharded, strict=True)]
    difference.plot(apart, color="#004c7f")
    for panel in (both, difference):
        panel.axvline(resumed, color="#b03a00", linestyle=":", label="resumed here")
    both.legend()
    path = folder / "curves.png"
    figure.savefig(path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; return 1 if a run did not end as it should."""
    options, others = parse_options(arguments)
    console = Console(highlight=False, soft_wrap=True)
    shutil.rmtree(options.output, ignore_errors=True)
    save_every = max(1, options.steps // 6)
    killed_in = 2 * options.steps // 3  # the step after a checkpoint's
    shared = [f"--steps={options.steps}", f"--save-every={save_every}", f"--device={options.device}", *others]
    stages = [
        ("unsharded", 1, "whole", ["--whole"]),
        (f"sharded, killed in step {killed_in}", options.processes, "parts", [f"--kill-in-step={killed_in}"]),
        ("sharded, resumed", options.resume_on, "parts", []),
    ]
    for name, processes, folder, own in stages:
        begin = time.perf_counter()
        ended = start(processes, options.output / folder, *shared, *own)
        seconds = time.perf_counter() - begin
        console.print(f"{name:32} {processes} process{'es' * (processes > 1):2} {seconds:6.1f} s")
        if (ended.returncode != 0) != any(option.startswith("--kill") for option in own):
            console.print(ended.stdout + ended.stderr, markup=False)
            return 1
    unsharded, sharded = (list(losses(options.output / folder).values()) for folder in ("whole", "parts"))
    resumed = (killed_in - 1) // save_every * save_every
    apart = [abs(one / other - 1) for one, other in zip(sharded, unsharded, strict=True)]
    console.print(f"Loss after {options.steps} steps: {unsharded[-1]:.6f} unsharded, {sharded[-1]:.6f} sharded.")
    console.print(f"Largest relative difference of any step's loss: {max(apart):.1e}.")
    console.print(f"Picture: {draw(options.output, unsharded, sharded, resumed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
