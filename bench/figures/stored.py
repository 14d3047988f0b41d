"""The stored results: the command that makes each, and how closely a second run agrees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.reporting import documents

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results"
SHARED = "in a second run on a shared machine, ratios agree to a fifth, times to a third"
#: Of runs in which others allocate memory in each step.
SHARED_ALLOCATING = (
    "in a second run on a shared machine, about nine ratios in ten agree to a fourth; of optimizers that allocate in a "
    "step, some differ by half, and the worst by a factor of 2.5"
)
#: Of processes that wait for each other.
SHARED_PROCESSES = "a second run on a shared machine agrees to a third"
SAME = "a second run gives the same digits"
SAME_HERE = f"{SAME}, other processors and releases of PyTorch move the last ones"
#: Of models that learn Python's own source.
SAME_PYTHON = f"{SAME}, other processors and releases of PyTorch and Python move them by a thousandth"

SAME_TRAINING = f"{SAME}; on another kind of processor, or with another PyTorch, as much differs as by one flipped bit"


@dataclass(frozen=True)
class Source:
    """Where a result comes from."""

    command: str  # of bench, with `--out bench/results` it writes the result anew; of examples, `bench store` does
    agreement: str = SHARED
    measured: bool = True  # on the machine that the result names; else the machine does not matter


SOURCES = {
    "demo-cpu": Source("python examples/train_language_model.py", SAME_PYTHON),
    "demo-cpu-amd": Source("python examples/train_language_model.py", SAME_PYTHON),
    "demo-8bit-cpu": Source(
        "python examples/train_language_model.py --optimizers agr-adamw --state-dtype 8bit", SAME_PYTHON
    ),
    "effect-small-models": Source("python -m bench effect --steps 300 --tag small-models", SAME_HERE),
    "gradients-cpu-2-cores": Source("python -m bench gradients --tag 2-cores"),
    "latency-float32-predicted": Source("python -m bench latency --tag predicted", SAME, measured=False),
    "memory-cpu-2-cores": Source(
        "python -m bench memory --threads 1 --tag 2-cores", "a second run counts the same bytes"
    ),
    "overhead-cpu-2-cores": Source("python -m bench overhead --tag 2-cores"),
    "release-cpu-2-cores": Source("python -m bench release --tag 2-cores"),
    "sharded-cpu-2-cores": Source("python -m bench sharded --steps 80 --tag 2-cores", SHARED_PROCESSES),
    "step-cpu-float32-2-cores": Source(
        "python -m bench step --seconds 60 --tag 2-cores --contenders agr-adamw agr-adamw-off torch-adamw-fused "
        "torch-adamw-foreach three-lines agr-adan optimi-adan-foreach pytorch-optimizer-adan",
        SHARED_ALLOCATING,
    ),
    "step-cpu-float32-gradients-2-cores": Source(
        "python -m bench step --threads 1 --sets 321x64 --tag gradients-2-cores "
        "--contenders agr-gradients agr-gradients-clipping torch-clip-grad-norm"
    ),
    "step-cpu-precision-2-cores": Source(
        "python -m bench step --precision --sets gpt2 --rounds 11 --seconds 400 --tag 2-cores",
        "a second run on a shared machine agrees to a fifth, where others allocate to a half",
    ),
    "step-cpu-float32-peers-2-cores": Source(
        "python -m bench step --seconds 20 --tag peers-2-cores --contenders agr-adamw agr-adamw-off "
        "torch-adamw-fused torch-adamw-foreach deepspeed-adamw three-lines three-lines-foreach three-lines-deepspeed "
        "bitsandbytes-adamw agr-adan agr-adan-off optimi-adan-foreach optimi-adan pytorch-optimizer-adan "
        "timm-adan-foreach three-lines-adan",
        SHARED_ALLOCATING,
    ),
    "sweep-cpu-2-cores": Source("python -m bench sweep --seconds 72 --tag 2-cores", SHARED_ALLOCATING),
    "train-demo": Source("python -m bench train --setting demo --tag demo", SAME_HERE),
    "train-full": Source("python -m bench train --tag full", SAME_TRAINING),
    "train-in-16-bits-cpu": Source("python examples/train_in_16_bits.py --results runs/16-bits.json", SAME_HERE),
    "watch-coefficients-cpu": Source(
        "python examples/watch_coefficients.py --results runs/coefficients.json", SAME_HERE
    ),
    "traffic-float32-h200": Source("python -m bench traffic --tag h200", SAME, measured=False),
}


def path(name: str) -> Path:
    """Return the file of a result."""
    return FOLDER / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    """Return a result. Raises ValueError, with its command, where it is missing, damaged, or of a run that goes on."""
    again = f"run `{SOURCES[name].command}`, whose result it is"
    try:
        document = documents.read(path(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path(name)} is missing or damaged ({error}): {again}") from error
    if not document.get("complete", True):
        raise ValueError(f"{path(name)} is not complete: {again}")
    return document


def caption(name: str) -> str:
    """Return a line on a result: its command, what it was measured on and when, and how closely a second run agrees."""
    source, machine = SOURCES[name], read(name)["machine"]
    return f"`{source.command}`{_measured_on(machine) if source.measured else ''}; {source.agreement}."


def _measured_on(machine: dict[str, Any]) -> str:
    threads = "" if machine.get("gpu") else f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    torch = machine["versions"]["torch"].partition("+")[0]
    return f", {machine['device_name']}{threads}, torch {torch}, {machine['date'][:10]}"
