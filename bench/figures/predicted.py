"""Tables of what models of GPUs and networks predict: `python -m bench traffic` and `latency`, and all-reduces."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import Any

from bench.figures.registry import block
from bench.reporting.markdown import table
from bench.reporting.units import duration, percent
from bench.workloads.shapes import MODELS, model_set

RULES = ("AdamW", "Adan")
# Of ring all-reduces with NCCL's tree, and of a GPU's memory: seconds a message, bytes a second.
MESSAGE_SECONDS, LINK, DRAM = 10e-6, 40e9, 3e12
#: Parameters and tensors of models.
LARGE = {"Llama-3 8B": (8.03e9, 291), "Llama-3 70B": (70.6e9, 723), "Llama-3 405B": (405.9e9, 1138)}
PROCESSES = (8, 1024, 16384)


@block("traffic", "traffic-float32-h200")
def traffic(run: dict[str, Any]) -> list[str]:
    found = {(row["set"], row["rule"], row["share"]): row for row in run["predictions"]}
    sets = list(dict.fromkeys(row["set"] for row in run["predictions"]))
    whole, half = sorted({row["share"] for row in run["predictions"]}, reverse=True)

    def line(label: str, rule: str, field: str, show: Callable[[float], str]) -> list[str]:
        shown = ([show(found[name, rule, share][field]) for share in (whole, half)] for name in sets)
        return [label, *(f"{first} ({second})" for first, second in shown)]

    rows = []
    for rule in RULES:
        rows.append(line(f"AGR-{rule}, bytes an element", rule, "total", "{:.2f}".format))
        rows.append(line(f"share of an ideal {rule} without AGR", rule, "ceiling", percent))
    rows.append(line("`regularize_gradients_`, bytes an element, of at least 8", "gradients", "total", "{:.2f}".format))
    return table(("", *(MODELS[name][0] for name in sets)), rows)


@block("latency", "latency-float32-predicted")
def latency(run: dict[str, Any]) -> list[str]:
    found = {(row["set"], row["rule"], row["gpu"], row["kernel"]): row for row in run["predictions"]}
    sets, rules, gpus, kernels = (list(dict.fromkeys(key[place] for key in found)) for place in range(4))

    def microseconds(row: dict[str, Any]) -> str:
        value = row["ns"] / 1e3
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def cell(name: str, rule: str, gpu: str) -> str:
        first, now = (found[name, rule, gpu, kernel] for kernel in kernels)
        return f"{microseconds(first)} / {microseconds(now)} ({now['share_of_copy']:.0%})"

    rows = [(rule, model_set(name).title, *(cell(name, rule, gpu) for gpu in gpus)) for rule in rules for name in sets]
    return table(("rule", "tensors", *gpus), rows)


@block("all-reduce")
def all_reduce() -> list[str]:
    """Return what a sharded step sends, two float64 numbers a tensor, beside what it has to move."""
    rows = []
    for name, (parameters, tensors) in LARGE.items():
        sent = 2 * 8 * tensors
        for processes in PROCESSES:
            network = 2 * log2(processes) * MESSAGE_SECONDS + 2 * sent / LINK
            update = 28 * parameters / processes / DRAM
            size = f"{parameters / 1e9:.3g}e9 ({tensors})"
            rows.append((name, size, f"{processes:,}", f"{sent / 1e3:.1f}", duration(network), duration(update)))
    headings = ("model", "parameters (tensors)", "processes", "numbers a step, KB", "all-reduce", "update")
    return table(headings, rows)
