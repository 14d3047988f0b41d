"""Reads ncu's counters of the profiled steps, and puts them beside what the cache model predicts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.reporting.markdown import table

READ, WRITTEN, DURATION = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
THROUGHPUT = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
HITS = "lts__t_sector_hit_rate.pct"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
METRICS = (READ, WRITTEN, DURATION, THROUGHPUT, HITS, WARPS, REGISTERS, "launch__grid_size", "launch__block_size")

# ncu is asked for base units; versions differ in what they call them, and in whether they heed it in every table.
PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS = {
    **{f"{prefix}{name}": factor for prefix, factor in PREFIXES.items() for name in ("byte", "second", "s")},
    **{"nsec": 1e-9, "usec": 1e-6, "msec": 1e-3, "sec": 1.0},
}

HEADINGS = (
    *("step", "needed", "DRAM read + written", "predicted (share of L2)"),
    *("DRAM busy", "L2 hits", "warps", "regs", "time"),
)

Kernel = dict[str, float]  # metric: value, in bytes, seconds, percent or a count
Prediction = Mapping[str, Any]  # of `python -m bench traffic`


def number(text: str, unit: str = "") -> float | None:
    """Return a value of ncu's in its base unit; None for what is no number."""
    try:
        return float(text.replace(",", "")) * UNITS.get(unit, 1.0)
    except ValueError:
        return None


def kernels(lines: Iterable[str]) -> list[Kernel]:
    """Return the metrics of every kernel in ncu's CSV, in the order of the launches.

    Of the page `raw`, with a line a kernel and a line of units below the headings, or of the page `details`, with a
    line a metric. Lines that are not CSV, ncu's own and the program's, are passed over.
    """
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    headings = next((row for row in rows if row and row[0] == "ID"), None)
    if headings is None:
        return []
    table = [dict(zip(headings, row, strict=True)) for row in rows if len(row) == len(headings) and row is not headings]
    units = next((row for row in table if not row["ID"]), {})
    found: dict[str, Kernel] = {}
    for row in (row for row in table if row["ID"]):
        kernel = found.setdefault(row["ID"], {})
        if "Metric Name" in row:
            values = {row["Metric Name"]: number(row["Metric Value"], row.get("Metric Unit", ""))}
        else:
            values = {name: number(row[name], units.get(name, "")) for name in METRICS if name in row}
        kernel.update({name: value for name, value in values.items() if value is not None})
    return list(found.values())


def predictions(folder: Path) -> list[Prediction]:
    """Return what `python -m bench traffic` predicted, each with the type it is for."""
    found: list[Prediction] = []
    for path in sorted(folder.glob("traffic-*.json")):
        document = json.loads(path.read_text())
        found += [{**entry, "dtype": document["settings"]["dtype"]} for entry in document["predictions"]]
    return found


def predicted(case: Mapping[str, Any], among: Sequence[Prediction]) -> dict[str, float]:
    """Return the predicted DRAM bytes an element for each share of the cache."""
    return {
        f"{entry['share']:g}": entry["total"]
        for entry in among
        if f"AGR-{entry['rule']}" == case["rule"]
        and (entry["set"], entry["dtype"]) == (case["set"], case["dtype"])
        and not entry["on_chip_bytes"]
    }


def compare(cases: Sequence[Mapping[str, Any]], found: Sequence[Kernel], among: Sequence[Prediction]) -> list[Any]:
    """Return a record a case: measured and predicted DRAM bytes an element, and the other counters.

    Raises ValueError unless there is one kernel for every case.
    """
    if len(cases) != len(found):
        raise ValueError(f"ncu saw {len(found)} kernels of {len(cases)} steps; one launch a step is what is promised")
    records = []
    for case, kernel in zip(cases, found, strict=True):
        read, written = (kernel.get(name, float("nan")) / case["elements"] for name in (READ, WRITTEN))
        measured = {"read": read, "written": written, "total": read + written}
        records.append({**case, "measured": measured, "predicted": predicted(case, among), "counters": kernel})
    return records


def compared(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines of a Markdown table, a record a row."""
    rows = []
    for record in records:
        measured, counters = record["measured"], record["counters"]
        foretold = ", ".join(f"{total:.2f} ({share})" for share, total in record["predicted"].items()) or "-"
        busy, hits, warps, registers, seconds = (
            counters.get(name, float("nan")) for name in (THROUGHPUT, HITS, WARPS, REGISTERS, DURATION)
        )
        cells = (
            f"{record['rule']}, {record['set']}, {record['dtype']}",
            f"{record['bytes_per_element']} B",
            f"{measured['read']:.2f} + {measured['written']:.2f} = {measured['total']:.2f}",
            foretold,
            *(f"{percent:.0f}%" for percent in (busy, hits, warps)),
            f"{registers:.0f}",
            f"{seconds * 1e6:.0f} us",
        )
        rows.append(cells)
    return table(HEADINGS, rows)
