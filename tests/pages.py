"""Finds the code of README.md and of the pages of docs/: a page's is run from top to bottom, in one namespace.

A block of `python` is run, one that begins with `>>>` is compared with the output that it shows. A block whose title
says that it needs a GPU is skipped where there is none. `invisible-code-block` in a comment is run and not shown.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

NEEDS_GPU = "needs a GPU"
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FRAMEWORKS = ROOT / "docs" / "frameworks.md"  # whose blocks need what only make frameworks installs
_visible = RawFencedCodeBlockLexer(re.compile(r"python\b(?P<options>[^\n]*)\n"))
_invisible = DirectiveInHTMLCommentLexer("invisible-code-block", "python")
_run = PythonEvaluator()
_doctests = DocTestStringParser(DocTestEvaluator(doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE))


def _run_if_possible(example: Example) -> None:
    if NEEDS_GPU in example.region.lexemes.get("options", "") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    _run(example)


def python_blocks(document: Document) -> Iterable[Region]:
    """Return the blocks of Python in a page."""
    for region in (*_visible(document), *_invisible(document)):
        source = region.parsed = region.lexemes["source"]
        if source.startswith(">>>"):
            for found in _doctests(source, document.path):
                found.adjust(region, source)
                yield found
        else:
            region.evaluator = _run_if_possible
            yield region


def examples(page: Path) -> list[Example]:
    """Return the blocks of a page, which are to be evaluated in this order."""
    pages = Sybil([python_blocks], path=str(page.parent), patterns=[page.name])
    return list(pages.parse(page).examples())
