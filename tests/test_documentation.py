"""The documentation: the code of every page runs, none is passed over, and README's links lead somewhere.

That the links of the site are right, `make docs` tests.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest
import torch

pytest.importorskip("sybil")  # a machine that was set up for training alone may have none

from pages import FRAMEWORKS, PAGES, ROOT, examples
from sybil.example import SybilFailure

README = ROOT / "README.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
# The frameworks are not installed here: tests/frameworks/test_page.py runs their page's code, by `make frameworks`.
RUN_HERE = [example for page in PAGES if page != FRAMEWORKS for example in examples(page)]


def addresses() -> tuple[str, str]:
    """The addresses of the site and of the repository."""
    found = dict(re.findall(r"^(site_url|repo_url): (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    return found["site_url"], found["repo_url"]


def test_the_package_names_the_same_addresses():
    allowed = addresses()
    project = (ROOT / "pyproject.toml").read_text()
    for url in re.findall(r"https://(?:agr-cuda\.github\.io|github\.com/agr-cuda)[^\s\"']*", project):
        assert url.startswith(tuple(address.rstrip("/") for address in allowed))


def test_a_package_index_can_show_the_readme():
    """It has no files beside it there: all links are absolute, and lead to what is there."""
    site, repository = addresses()
    raw = repository.replace("//github.com", "//raw.githubusercontent.com") + "/main/"
    links = LINK.findall(README.read_text())
    assert any(link.startswith(site) for link in links)
    for link in links:
        assert link.startswith("https://"), link
        if link.startswith(site):
            page = link.removeprefix(site).partition("#")[0].strip("/") or "index"
            assert (ROOT / "docs" / f"{page}.md").is_file(), link
        elif link.startswith((raw, f"{repository}/blob/main/")):
            path = link.removeprefix(raw).removeprefix(f"{repository}/blob/main/")
            assert (ROOT / path).is_file(), link
        else:
            assert link.startswith("https://arxiv.org/"), link


def test_the_readme_is_short_and_names_its_commands():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert "    make demo " in text
    assert "    make test " in text
    assert "No GPU has run this yet" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language_as_the_tests_know_it(page):
    """A block of `py`, or of `Python`, would not be run."""
    fences = re.findall(r"^ *(?:```+|~~~+)(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    for opening in fences[::2]:
        assert re.fullmatch(r'python|python title="[^"]*needs a GPU[^"]*"|sh|text', opening), opening


@pytest.mark.parametrize(
    "example",
    [pytest.param(example, id=f"{Path(example.path).name}:{example.line}") for example in RUN_HERE],
)
def test_the_code_of_every_page_runs(example):
    torch.manual_seed(0)
    example.evaluate()


def test_no_page_is_left_out_but_that_of_the_frameworks():
    """One in a folder of docs/ would be noticed, too."""
    pages = [README, *(ROOT / "docs").rglob("*.md")]
    with_code = {page for page in pages if re.search(r"^ *```+python", page.read_text(), re.MULTILINE)}
    assert with_code - {Path(example.path) for example in RUN_HERE} == {ROOT / "docs" / "frameworks.md"}


def test_the_page_of_the_frameworks_is_read_by_the_same_sybil():
    files = ROOT / "pyproject.toml", ROOT / "tests" / "frameworks" / "requirements.txt"
    here, there = (re.findall(r"sybil==([\d.]+)", file.read_text()) for file in files)
    assert here == there
    assert len(here) == 1


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ("```python\nassert 1 == 2\n```\n", "1 == 2"),
        ("```python\n>>> 1 + 1\n3\n```\n", "Expected"),
        ('```python title="no GPU here"\nraise KeyError("broken")\n```\n', "broken"),
        ("<!--- invisible-code-block: python\nraise KeyError('broken')\n--->\n", "broken"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", "x == 2"),
    ],
)
def test_a_broken_block_is_noticed(block, told, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{block}")
    *good, broken = examples(page)
    for example in good:
        example.evaluate()
    with pytest.raises((AssertionError, KeyError, SybilFailure)) as raised:
        broken.evaluate()
    assert told in "".join(traceback.format_exception(raised.value))
