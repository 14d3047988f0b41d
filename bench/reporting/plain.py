"""Stands in for the parts of rich that bench uses where rich is not installed: the same calls, plain text."""

from __future__ import annotations

import re
from typing import Any

MARKUP = re.compile(r"\[/?(?:bold|dim|red|green)?\]")


class Text(str):
    """A text whose style is dropped."""

    def __new__(cls, text: str, style: str = "") -> Text:
        """Return the text."""
        return super().__new__(cls, text)


class Table:
    """Rows under headings, each column as wide as its widest cell."""

    def __init__(self, title: str = "", caption: str = "", **looks: Any) -> None:
        self.title, self.caption = title, caption
        self._rows: list[list[str]] = [[]]
        self._to_the_right: list[bool] = []

    def add_column(self, heading: str, justify: str = "left", **looks: Any) -> None:
        """Add a column."""
        self._rows[0].append(heading)
        self._to_the_right.append(justify == "right")

    def add_row(self, *cells: str, style: str | None = None) -> None:
        """Add a row; cells that are not given are empty."""
        shown = [MARKUP.sub("", cell) for cell in cells]
        self._rows.append([*shown, *[""] * (len(self._rows[0]) - len(cells))])

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self._to_the_right, strict=True)
            ).rstrip()
            for row in self._rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(line for line in (self.title, *lines, self.caption) if line)


class Console:
    """Prints to standard output."""

    def __init__(self, width: int | None = None) -> None:
        pass

    def print(self, thing: Table | str = "", *, markup: bool = True, **looks: Any) -> None:
        """Print a table, or a line without its markup."""
        print(MARKUP.sub("", thing) if markup and isinstance(thing, str) else thing, flush=True)
