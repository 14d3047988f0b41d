"""Tables of what the programs of examples/ have found."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.figures.registry import block
from bench.reporting.markdown import table
from bench.reporting.units import duration, percent

DEMO, DEMO_8BIT = "demo-cpu", "demo-8bit-cpu"


def _last_loss(run: dict[str, Any], optimizer: str) -> float:
    (found,) = (row["held_out_loss"][-1] for row in run["runs"] if row["optimizer"] == optimizer)
    return float(found)


@block("demo", DEMO)
def demo(run: dict[str, Any]) -> list[str]:
    names = [row["optimizer"] for row in run["runs"]]
    rows = ((name, f"{_last_loss(run, name):.4f}") for name in names)
    return table(("", "held-out loss, nats a byte"), rows)


@block("demo-on-two-processors", DEMO, "demo-cpu-amd")
def demo_on_two_processors(*runs: dict[str, Any]) -> list[str]:
    def cell(run: dict[str, Any], name: str) -> str:
        loss = _last_loss(run, name)
        without = name.removeprefix("AGR-")
        return f"{loss:.4f}" + (f" ({loss / _last_loss(run, without) - 1:+.2%})" if name != without else "")

    names = [row["optimizer"] for row in runs[0]["runs"]]
    rows = ([name, *(cell(run, name) for run in runs)] for name in names)
    return table(("held-out loss, nats a byte", *(run["machine"]["device_name"] for run in runs)), rows)


@block("demo-times", DEMO)
def demo_times(run: dict[str, Any]) -> str:
    steps = (
        f"{duration(row['median_step_seconds'])} with {row['optimizer']} ({percent(row['median_optimizer_share'])})"
        for row in run["runs"]
    )
    return f"{run['seconds']:.0f} seconds. A step takes {', '.join(steps)}"


@block("demo-8bit", DEMO, DEMO_8BIT)
def demo_8bit(float32: dict[str, Any], codes: dict[str, Any]) -> list[str]:
    name = "AGR-AdamW"
    first, second = _last_loss(float32, name), _last_loss(codes, name)
    sizes = [row["state_bytes"] for run in (float32, codes) for row in run["runs"] if row["optimizer"] == name]
    rows = (
        ("float32", f"{first:.4f}", f"{sizes[0]:,}"),
        ("8 bits", f"{second:.4f} ({second / first - 1:+.2%})", f"{sizes[1]:,}"),
    )
    return table(("state", "held-out loss, nats a byte", "bytes of state"), rows)


@block("train-in-16-bits", "train-in-16-bits-cpu")
def train_in_16_bits(run: dict[str, Any]) -> list[str]:
    first = run["rows"][0]["losses"][-1]
    rows = [
        (
            row["stored_as"],
            f"{row['losses'][-1]:.4f}",
            "" if place == 0 else f"{row['losses'][-1] / first - 1:+.2%}",
            f"{row['stored_bytes']:,}",
        )
        for place, row in enumerate(run["rows"])
    ]
    return table(("", "loss", "beside float32", "bytes of parameters and state"), rows)


@block("watch-coefficients", "watch-coefficients-cpu")
def watch_coefficients(run: dict[str, Any]) -> list[str]:
    """Medians over the steps; the last column is the median over the tensors."""
    rows = []
    for kind in ("matrix", "embedding", "norm", "bias"):
        alike = [row for row in run["rows"] if row["kind"] == kind]
        sizes, shares = [row["elements"] for row in alike], [median(row["removed"]) for row in alike]
        size = f"{min(sizes):,}" + (f" to {max(sizes):,}" if max(sizes) > min(sizes) else "")
        times = median(share * n for share, n in zip(shares, sizes, strict=True))
        span = f"{100 * min(shares):.3g}% to {100 * max(shares):.3g}%"
        rows.append((kind, str(len(alike)), size, span, f"{times:.1f}"))
    takes = "AGR takes, of the least and the most affected tensor"
    return table(("kind", "tensors", "elements", takes, "times 1/n"), rows)
