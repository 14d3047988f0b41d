"""Console, tables and texts of the terminal: rich's, or plain ones where rich is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError:  # on a machine that was set up for training alone, say
    # The same names for plain text's classes, which mypy cannot know to be like rich's.
    from bench.reporting.plain import Console, Table, Text  # type: ignore[assignment]

__all__ = ["Console", "Table", "Text", "console", "table"]

PLAIN_WIDTH = 180  # columns where the output is no terminal


def console() -> Console:
    """Return a console for standard output, wide enough for the tables where that is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)


def table(title: str, texts: Sequence[str], numbers: Sequence[str], caption: str = "") -> Table:
    """Return a table without rows: columns of texts, then of numbers, which are flush right."""
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for heading in texts:
        made.add_column(heading, no_wrap=True)
    for heading in numbers:
        made.add_column(heading, justify="right", no_wrap=heading == "quartiles")
    return made
