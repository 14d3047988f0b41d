"""Tables of what a step costs the host: `python -m bench overhead`, `gradients`, `release` and `sharded`."""

from __future__ import annotations

from typing import Any

from bench.figures.registry import block
from bench.reporting.markdown import table
from bench.reporting.units import duration, ratio

OVERHEAD = "overhead-cpu-2-cores"
OPTIMIZERS = {
    "agr_cuda AdamW": "**AGR-AdamW**",
    "agr_cuda Adan": "**AGR-Adan**",
    "torch AdamW, fused, its operation left out": "torch.optim.AdamW, fused, without its operation",
    "torch AdamW, fused, on the CPU": "torch.optim.AdamW, fused, on the CPU",
    "torch AdamW, fused": "torch.optim.AdamW, fused",
}
PATTERNS = {
    "the same every time": "the same every time",
    "one tensor every other time": "one tensor has none every other time",
    "another tenth each time": "another tenth has none each time",
    "half and half": "one half and the other in turn",
}
RELEASED = {
    "agr_cuda AdamW, released": "**agr_cuda.AdamW, released**",
    "optimi AdamW, prepare_for_gradient_release": "optimi's AdamW, `prepare_for_gradient_release`",
    "torch AdamW, fused, one for each parameter in hooks": "torch.optim.AdamW(fused=True) for each, in hooks",
    "agr_cuda AdamW, ordinary": "agr_cuda.AdamW, ordinary",
}
SHARDED = {
    "torch AdamW, fused": "torch.optim.AdamW, fused",
    "torch AdamW, default": "torch.optim.AdamW, default",
    "agr_cuda AdamW": "**AGR-AdamW**, all-reduce included",
    "agr_cuda AdamW, clipping": "**AGR-AdamW**, with `max_grad_norm`",
    "agr_cuda Adan": "**AGR-Adan**, all-reduce included",
    "agr_cuda AdamW without AGR": "agr_cuda.AdamW, `agr=False`",
    "agr_cuda AdamW without AGR, plain tensors": "the same with plain tensors of the parts' size",
}


def _overhead(run: dict[str, Any], label: str, gradients: str) -> dict[str, Any]:
    (row,) = (row for row in run["rows"] if (row["label"], row["gradients"]) == (label, gradients))
    found: dict[str, Any] = row
    return found


@block("overhead", OVERHEAD)
def overhead(run: dict[str, Any]) -> list[str]:
    def cell(label: str, gradients: str) -> str:
        row = _overhead(run, label, gradients)
        shown = f"{duration(row['host_s']['smallest'])}, {duration(row['host_s']['median'])}"
        ratios = [row[name]["median"] for name in ("ratio", "ratio_to_whole") if row[name]]
        return shown if len(ratios) < 2 else f"{shown} ({', '.join(map(ratio, ratios))})"

    labels = [label for label in OPTIMIZERS if any(row["label"] == label for row in run["rows"])]
    rows = [(OPTIMIZERS[label], cell(label, "kept"), cell(label, "new")) for label in labels]
    return table(("fastest, median (ratios)", "same gradients all the time", "new gradients for every step"), rows)


@block("overhead-in-short", OVERHEAD)
def overhead_in_short(run: dict[str, Any]) -> str:
    kept, new = (_overhead(run, "agr_cuda AdamW", gradients) for gradients in ("kept", "new"))
    times = [duration(row["host_s"]["median"]) for row in (kept, new)]
    ratios, whole = ([ratio(row[name]["median"]) for row in (kept, new)] for name in ("ratio", "ratio_to_whole"))
    return (
        f"{times[0]} with the same gradients, {times[1]} with new ones: {' and '.join(ratios)} of torch's fused AdamW "
        f"without its operation, {' and '.join(whole)} with it"
    )


@block("gradients", "gradients-cpu-2-cores")
def gradients(run: dict[str, Any]) -> list[str]:
    labels = [label for label in OPTIMIZERS if any(row["label"] == label for row in run["rows"])]
    found = {(row["pattern"], row["label"]): row for row in run["rows"]}

    def cell(row: dict[str, Any]) -> str:
        shown = duration(row["host_s"]["median"])
        return f"{shown} ({ratio(row['ratio']['median'])})" if row["ours"] else shown

    rows = [(text, *(cell(found[pattern, label]) for label in labels)) for pattern, text in PATTERNS.items()]
    return table(("gradients", *(OPTIMIZERS[label] for label in labels)), rows)


@block("release", "release-cpu-2-cores")
def release(run: dict[str, Any]) -> list[str]:
    rows = [(RELEASED[row["label"]], duration(row["host_s"]["median"])) for row in run["rows"]]
    return table(("", "backward and step"), rows)


@block("sharded", "sharded-cpu-2-cores")
def sharded(run: dict[str, Any]) -> list[str]:
    rows = [
        (SHARDED[row["label"]], duration(row["host_s"]["median"]), ratio(row["ratio"]["median"])) for row in run["rows"]
    ]
    return table(("optimizer", "step()", "of torch's fused"), rows)
