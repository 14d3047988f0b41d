"""The code of README.md and of every page of docs/ is run as tests: a page from top to bottom, in one namespace.

A block of `python` is run, one that begins with `>>>` is compared with the output that it shows. A block whose title
says that it needs a GPU is skipped where there is none. `invisible-code-block` in a comment is run and not shown.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

NEEDS_GPU = "needs a GPU"
ROOT = Path(__file__).parent
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


def _begin(namespace: dict[str, Any]) -> None:
    torch.manual_seed(0)


def _end(namespace: dict[str, Any]) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()


pages = Sybil([python_blocks], path=str(ROOT), patterns=["README.md", "docs/*.md"], setup=_begin, teardown=_end)
pytest_collect_file = pages.pytest()
