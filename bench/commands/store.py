"""Store what an example has found among the results of bench/results, so that pages can be made from it.

Takes the JSON that an example writes (results.json of its folder, or what --results names), leaves out paths and the
single losses of training, and adds the machine, which is to be the one that the example ran on. Then name the result in
bench/figures/stored.py.

Writes NAME.json into the output folder. Exit code 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from bench.commands import options
from bench.measuring import machine
from bench.reporting import documents

LONGEST = 100  # of a list of single values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("results", type=Path, metavar="FILE", help="what the example has written")
    parser.add_argument("name", type=options.file_tag, metavar="NAME", help="what it is stored as")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results"),
        metavar="FOLDER",
        help="folder of the stored results, made if missing (default: bench/results)",
    )


def without_long_lists(value: Any) -> Any:
    """Return a document without the lists of numbers that are longer than LONGEST."""
    if isinstance(value, dict):
        return {key: without_long_lists(item) for key, item in value.items() if not _is_long(item)}
    return [without_long_lists(item) for item in value] if isinstance(value, list) else value


def _is_long(value: object) -> bool:
    return isinstance(value, list) and len(value) > LONGEST and not isinstance(value[0], dict)


def run(args: argparse.Namespace) -> int:
    """Write the stored result."""
    found = documents.read(args.results)
    asked = found.pop("options")
    del found["environment"]
    torch.set_num_threads(asked["threads"])  # which the machine's description tells
    document = {
        "format": 1,
        "machine": machine.describe(torch.device(asked["device"])),
        "settings": {name: value for name, value in asked.items() if os.sep not in str(value)},
        **without_long_lists(found),
    }
    path: Path = args.out / f"{args.name}.json"
    documents.write(path, document)
    print(f"Wrote {path}")
    return 0
