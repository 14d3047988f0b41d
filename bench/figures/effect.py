"""The table of `python -m bench effect`."""

from __future__ import annotations

from itertools import product
from statistics import median
from typing import Any

from bench.figures.registry import block
from bench.reporting.effect_rows import EffectRow
from bench.reporting.markdown import table

TASKS = {"gpt": "GPT", "resnet": "ResNet", "vit": "ViT"}
PLURALS = {"matrix": "matrices", "embedding": "embeddings", "norm": "norms", "bias": "biases"}


def _share(values: list[float]) -> str:
    return f"{100 * median(values):#.2g}".rstrip(".") + "%"


@block("effect", "effect-small-models")
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
