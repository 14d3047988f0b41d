"""Tables of `python -m bench effect`, and what they say of models that people train."""

from __future__ import annotations

from itertools import product
from math import prod
from statistics import median
from typing import Any

from bench.figures.registry import block
from bench.reporting.effect_rows import EffectRow
from bench.reporting.markdown import table
from bench.reporting.train_tables import TASKS
from bench.workloads.shapes import MODELS, Shape, model_set

RESULT = "effect-small-models"
PLURALS = {"matrix": "matrices", "embedding": "embeddings", "norm": "norms", "bias": "biases"}


def _share(values: list[float]) -> str:
    return f"{100 * median(values):#.2g}".rstrip(".") + "%"


@block("effect", RESULT)
def effect(run: dict[str, Any]) -> list[str]:
    """Medians over the tensors of a kind."""
    of_tensors = [row for row in (EffectRow(**record) for record in run["rows"]) if row.scope == "tensor"]
    rows = []
    for task, kind in product(TASKS, PLURALS):
        alike = [row for row in of_tensors if (row.task, row.kind) == (task, kind)]
        if not alike:
            continue
        by_rule = {rule: [row for row in alike if row.rule == rule] for rule in ("AdamW", "Adan")}
        sizes = [row.elements for row in alike]
        size = f"{min(sizes):,}" + (f" to {max(sizes):,}" if max(sizes) > min(sizes) else "")
        label = PLURALS[kind] if len(by_rule["AdamW"]) > 1 else kind
        changes = (_share([row.change for row in found]) for found in by_rule.values())
        rows.append((f"{TASKS[task]}, {label}", size, _share([row.removed for row in alike]), *changes))
    changed = "AdamW's update changes by", "Adan's"
    return table(("task, kind of parameter", "elements", "AGR takes of the abs-sum", *changed), rows)


@block("effect-law", RESULT)
def law(run: dict[str, Any]) -> str:
    found = [f"{law['factor']:.2f} (sum of a_i^2)^{law['exponent']:.2f} for {law['rule']}" for law in run["laws"]]
    r_squared = " and ".join(f"{law['r_squared']:.3f}" for law in run["laws"])
    return f"{', '.join(found)} (least squares of logarithms over {run['laws'][0]['tensors']} tensors, R2 {r_squared})"


def _is_matrix(shape: Shape) -> bool:
    """Whether it is none of a norm, a bias or another vector, which have one dimension that counts."""
    return sum(length > 1 for length in shape) > 1


@block("effect-in-models", RESULT)
def in_models(run: dict[str, Any]) -> list[str]:
    """Apply the law of AdamW where a gradient's sum of a_i^2 is as many times 1/n as in the small models."""
    of_tensors = [row for row in (EffectRow(**r) for r in run["rows"]) if (row.rule, row.scope) == ("AdamW", "tensor")]
    times = {
        matrix: median(r.removed * r.elements for r in of_tensors if (r.kind in ("matrix", "embedding")) == matrix)
        for matrix in (True, False)
    }
    (law,) = (law for law in run["laws"] if law["rule"] == "AdamW")

    def cell(sizes: list[int], matrix: bool) -> str:
        changes = [law["factor"] * (times[matrix] / n) ** law["exponent"] for n in sizes]
        return f"{_share([min(changes)])} to {_share([max(changes)])}"

    rows = []
    for name in MODELS:
        model = model_set(name)
        small, large = ([prod(s) for s in model.shapes if _is_matrix(s) == matrix] for matrix in (False, True))
        rows.append((model.title, f"{sum(small) / model.elements:.2%}", cell(small, False), cell(large, True)))
    norms = "norms and biases: their share of the elements"
    return table(("model", norms, "AdamW's update of them changes by", "that of matrices by"), rows)
