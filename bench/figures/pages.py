"""Fills the blocks of pages."""

from __future__ import annotations

import re
from pathlib import Path

from bench.figures.registry import BLOCKS
from bench.figures.stored import ROOT

BEGIN, END = "<!-- figures: ", "<!-- end of figures -->"
MARKED = re.compile(rf"(?P<begin>{BEGIN}(?P<name>[^>]*?) -->)(?P<text>.*?){END}", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names(text: str) -> list[str]:
    """Return the names of a page's blocks. Raises ValueError where marks do not pair, or a name is not known."""
    found = list(MARKED.finditer(text))
    if not len(found) == text.count(BEGIN) == text.count(END):
        raise ValueError(f"{text.count(BEGIN)} marks {BEGIN}... --> and {text.count(END)} marks {END} do not pair")
    for mark in found:
        if mark["name"] not in BLOCKS:
            raise ValueError(f"there is no block {mark['name']!r}: allowed are {', '.join(sorted(BLOCKS))}")
    return [mark["name"] for mark in found]


def filled(text: str) -> str:
    """Return a page with its blocks made anew."""
    names(text)
    return MARKED.sub(lambda mark: f"{mark['begin']}{BLOCKS[mark['name']].text()}{END}", text)


def stale(text: str) -> list[str]:
    """Return the names of the blocks that are not what the stored results say."""
    names(text)
    return [mark["name"] for mark in MARKED.finditer(text) if mark["text"] != BLOCKS[mark["name"]].text()]
