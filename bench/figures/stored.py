"""The stored results: the command that makes each, and how closely a second run agrees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.reporting import documents

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results"
SHARED = "a second run on a shared machine agrees to a tenth"
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
    "demo-8bit-cpu": Source(
        "python examples/train_language_model.py --optimizers agr-adamw --state-dtype 8bit", SAME_PYTHON
    ),
    "effect-small-models": Source("python -m bench effect --steps 300 --tag small-models", SAME_HERE),
    "gradients-cpu-epyc-2-cores": Source("python -m bench gradients --tag epyc-2-cores"),
    "latency-float32-predicted": Source("python -m bench latency --tag predicted", SAME, measured=False),
    "memory-cpu-epyc-2-cores": Source(
        "python -m bench memory --threads 1 --tag epyc-2-cores", "a second run counts the same bytes"
    ),
    "overhead-cpu-epyc-2-cores": Source("python -m bench overhead --tag epyc-2-cores"),
    "release-cpu-epyc-2-cores": Source("python -m bench release --tag epyc-2-cores"),
    "sharded-cpu-epyc-2-cores": Source("python -m bench sharded --steps 80 --tag epyc-2-cores"),
    "step-cpu-float32-epyc-2-cores": Source("python -m bench step --seconds 60 --tag epyc-2-cores"),
    "step-cpu-precision-epyc-2-cores": Source(
        "python -m bench step --precision --sets gpt2 --rounds 11 --seconds 400 --tag epyc-2-cores",
        "where in memory an optimizer's tensors happen to lie moves its figure by up to a fifth from run to run",
    ),
    "step-cpu-float32-peers-epyc-2-cores": Source(
        "python -m bench step --seconds 20 --tag peers-epyc-2-cores --contenders agr-adamw agr-adamw-off "
        "torch-adamw-fused torch-adamw-foreach deepspeed-adamw three-lines three-lines-foreach three-lines-deepspeed "
        "bitsandbytes-adamw agr-adan agr-adan-off optimi-adan-foreach optimi-adan pytorch-optimizer-adan "
        "timm-adan-foreach three-lines-adan",
        "a second run on a shared machine agrees to a fifth, since there are three rounds of the models",
    ),
    "sweep-cpu-epyc-2-cores": Source("python -m bench sweep --seconds 72 --tag epyc-2-cores"),
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


def caption(name: str) -> str:
    """Return a line on a result: its command, what it was measured on and when, and how closely a second run agrees."""
    source, machine = SOURCES[name], documents.read(path(name))["machine"]
    return f"`{source.command}`{_measured_on(machine) if source.measured else ''}; {source.agreement}."


def _measured_on(machine: dict[str, Any]) -> str:
    threads = "" if machine.get("gpu") else f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    torch = machine["versions"]["torch"].partition("+")[0]
    return f", {machine['device_name']}{threads}, torch {torch}, {machine['date'][:10]}"
