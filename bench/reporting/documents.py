"""JSON files of a run, short enough to be read and committed: a record a line, six digits a number."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.reporting.targets import Target

DIGITS = 6  # significant ones; timings repeat to two or three


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Return the value with every float in it rounded to so many digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def _has_records(value: Any) -> bool:
    """Whether there is a list of objects in the value."""
    if isinstance(value, list):
        return any(isinstance(item, dict) or _has_records(item) for item in value)
    return isinstance(value, dict) and any(map(_has_records, value.values()))


def _laid_out(value: Any, margin: str = "", record: bool = False) -> str:
    """Return the value as JSON in several lines, unless it is a record without further records in it, or simple."""
    inside = f"{margin} "
    if isinstance(value, dict) and value and (not record or _has_records(value)):
        items = [f"{json.dumps(key)}: {_laid_out(item, inside)}" for key, item in value.items()]
        begin, end = "{}"
    elif _has_records(value):
        items = [_laid_out(item, inside, record=True) for item in value]
        begin, end = "[]"
    else:
        return json.dumps(value)
    return f"{begin}\n" + ",\n".join(inside + item for item in items) + f"\n{margin}{end}"


def write(path: Path, document: Mapping[str, Any], digits: int = DIGITS) -> None:
    """Write a document, into a folder that is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_laid_out(rounded(document, digits)) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Return a document that was written."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def write_run(
    command: str,
    args: argparse.Namespace,
    about: Mapping[str, Any],
    settings: Sequence[str],
    rows: Sequence[Any],
    targets: Sequence[Target],
) -> Path:
    """Write what a command measured into COMMAND-DEVICE-TAG.json of the output folder, and return that path.

    Args:
        command: the command's name.
        args: its options.
        about: the document's format, the machine, and whatever else the command says of the run.
        settings: the names of the options to write down.
        rows: dataclasses, one a measurement.
        targets: what was judged.
    """
    document = {
        **about,
        "settings": {name: getattr(args, name) for name in settings},
        "rows": [asdict(row) for row in rows],
        "targets": [target.record() for target in targets],
    }
    path: Path = args.out / f"{command}-{args.device.type}-{args.tag}.json"
    write(path, document)
    return path
