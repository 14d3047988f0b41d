"""Tables of `python -m bench step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.figures.registry import block
from bench.reporting.markdown import table
from bench.reporting.results import Figures, SetResult, sets_of
from bench.reporting.units import duration, ratio
from bench.workloads.contenders import YARDSTICK

RUN = "step-cpu-float32-2-cores"
PEERS = "step-cpu-float32-peers-2-cores"
SWEEP = "sweep-cpu-2-cores"
PRECISION = "step-cpu-precision-2-cores"
OURS = {"agr-adamw": "**AGR-AdamW**", "agr-adan": "**AGR-Adan**"}
LABELS = {
    **OURS,
    "agr-adamw-off": "agr_cuda.AdamW, agr=False",
    YARDSTICK: "torch.optim.AdamW, fused",
    "torch-adamw-foreach": "torch.optim.AdamW, foreach",
    "three-lines": "three lines of AGR before torch's fused",
    "optimi-adan-foreach": "optimi's Adan, foreach",
    "pytorch-optimizer-adan": "pytorch_optimizer's Adan",
}
IN_SHORT = ("agr-adamw", YARDSTICK, "three-lines")
OF_ADAN = ("agr-adan", "optimi-adan-foreach", "pytorch-optimizer-adan")
ALL = ("agr-adamw", "agr-adamw-off", YARDSTICK, "torch-adamw-foreach", "three-lines", *OF_ADAN)
MODELS, SMALL = ("gpt2", "resnet50", "vit-b-16"), "321x64"
# How numbers are stored, who stores them so with AGR, and who comes nearest without it.
FORMATS = (
    ("float32", "agr-adamw", {YARDSTICK: "torch, fused"}),
    ("bfloat16", "agr-adamw-bfloat16", {"torch-adamw-fused-bfloat16": "torch, fused"}),
    (
        "bfloat16, float32 masters",
        "agr-adamw-bfloat16-master",
        {"torch-adamw-fused-master": "torch, fused, and copies from and to the masters"},
    ),
    (
        "bfloat16, stochastic rounding",
        "agr-adamw-bfloat16-stochastic",
        {"torchao-adamw-bfloat16-stochastic": "torchao", "optimi-adamw-kahan": "optimi, Kahan sums"},
    ),
    ("float32, 8-bit state", "agr-adamw-float32-8bit", {"torchao-adamw-float32-8bit": "torchao"}),
    ("bfloat16, 8-bit state", "agr-adamw-bfloat16-8bit", {"torchao-adamw-bfloat16-8bit": "torchao"}),
)


def _figures(result: SetResult, name: str) -> Figures:
    found = result.figures(name)
    if found is None:
        raise ValueError(f"the stored run has not measured {name} on {result.title}")
    return found


def _label(result: SetResult, name: str) -> str:
    """Return how pages call a contender: as the run does, where nothing else is said."""
    return LABELS.get(name) or next(row.label for row in result.rows if row.name == name)


def _cell(result: SetResult, name: str, with_time: bool) -> str:
    figures = _figures(result, name)
    shown = "1" if name == YARDSTICK else ratio(figures.ratio.median)
    return f"{shown} ({duration(figures.step_s.median)})" if with_time else shown


def _ratios(sets: Sequence[SetResult], names: Sequence[str], timed: Sequence[str]) -> list[str]:
    rows = ([_label(sets[0], name), *(_cell(result, name, name in timed) for result in sets)] for name in names)
    return table(("ratio of times; lower is better", *(result.title for result in sets)), rows)


def _span(run: dict[str, Any], name: str) -> str:
    """Return the least and the largest ratio that a contender has for models' tensors."""
    found = [_figures(result, name).ratio.median for result in sets_of(run) if result.name in MODELS]
    return f"{ratio(min(found))} to {ratio(max(found))}"


@block("step-in-short", RUN)
def in_short(run: dict[str, Any]) -> list[str]:
    sets = [result for result in sets_of(run) if result.name in (*MODELS, SMALL)]
    return _ratios(sets, IN_SHORT, (YARDSTICK,))


@block("step", RUN)
def all_contenders(run: dict[str, Any]) -> list[str]:
    return _ratios(sets_of(run), ALL, (*OURS, YARDSTICK))


@block("step-peers", PEERS)
def peers(run: dict[str, Any]) -> list[str]:
    sets = sets_of(run)
    return _ratios(sets, [row.name for row in sets[0].rows], (*OURS, YARDSTICK))


@block("sweep", SWEEP)
def sweep(run: dict[str, Any]) -> list[str]:
    """Show the fewest and the most tensors, at the smallest and the largest size, and one between."""
    found = sets_of(run)
    counts = sorted({result.tensors for result in found})
    shown = []
    for count in (counts[0], counts[-1]):
        alike = sorted((result for result in found if result.tensors == count), key=lambda result: result.elements)
        shown += [alike[0], *(result for result in alike if result.elements == 2**20), alike[-1]]
    names = [row.name for row in shown[0].rows if row.status == "measured"]
    rows = (
        [_label(shown[0], name), *(duration(_figures(result, name).step_s.median) for result in shown)]
        for name in names
    )
    headings = [f"{r.tensors:,} tensor{'s' * (r.tensors > 1)}, {r.elements:,} elements in all" for r in shown]
    return table(("time of a step", *headings), rows)


@block("sweep-most", SWEEP)
def sweep_most(run: dict[str, Any]) -> str:
    return ratio(max(_figures(result, "agr-adamw").ratio.median for result in sets_of(run)))


@block("small-gradients", "step-cpu-float32-gradients-2-cores")
def small_gradients(run: dict[str, Any]) -> list[str]:
    (result,) = sets_of(run)
    rows = ((_label(result, row.name), duration(_figures(result, row.name).step_s.median)) for row in result.rows)
    return table(("321 gradients of 64 elements", "median"), rows)


@block("step-models", RUN)
def models(run: dict[str, Any]) -> str:
    return _span(run, "agr-adamw")


@block("step-small-tensors", RUN)
def small_tensors(run: dict[str, Any]) -> str:
    (result,) = (result for result in sets_of(run) if result.name == SMALL)
    return ratio(_figures(result, "agr-adamw").ratio.median)


@block("step-three-lines", RUN)
def three_lines(run: dict[str, Any]) -> str:
    return _span(run, "three-lines")


@block("masters-byte", PRECISION)
def masters_byte(run: dict[str, Any]) -> str:
    (found,) = (target["measured"] for target in run["targets"] if "with float32 masters" in target["text"])
    return ratio(found)


@block("masters-byte-adan", PRECISION)
def masters_byte_adan(run: dict[str, Any]) -> str:
    (result,) = sets_of(run)
    return ratio(_figures(result, "agr-adan-bfloat16-master").ratio_per_byte)


@block("step-precision", PRECISION)
def precision(run: dict[str, Any]) -> list[str]:
    (result,) = sets_of(run)

    def time(name: str) -> str:
        return duration(_figures(result, name).step_s.median)

    rows = [
        (stored, time(ours), "; ".join(f"{label}: {time(name)}" for name, label in others.items()))
        for stored, ours, others in FORMATS
    ]
    return table(("parameters and state", "agr-cuda, with AGR", "without AGR, the nearest there is"), rows)
