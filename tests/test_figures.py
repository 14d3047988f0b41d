"""The tables and pictures of README.md and docs/ are those of the stored results, whose commands are told."""

from __future__ import annotations

import json
import re
import shlex

import pytest

# Imports follow what they need, which is not there on a machine that was set up for training alone.
# ruff: noqa: E402
for package in ("matplotlib", "rich", "scipy", "sklearn"):
    pytest.importorskip(package)

from benchmarks import refusal
from matplotlib.figure import Figure

from bench.__main__ import build_parser, main
from bench.figures import pages, registry, stored
from bench.figures import pictures as all_pictures
from bench.figures.pictures import PICTURES, Picture
from bench.figures.registry import BLOCKS
from bench.reporting import pictures

ROOT = stored.ROOT
PAGES = pages.pages()
STORED = sorted(path.stem for path in stored.FOLDER.glob("*.json"))
MAKE = "run `make figures`"
A_TIME = re.compile(r"^\|.*\d (?:s|ms|us|µs|ns)\b.*\|$", re.MULTILINE)
# Whose table says that it was measured once.
WITHOUT_A_RESULT = {"graphs.md"}
OTHER_PICTURES = {"docs/train_fsdp.png"}  # `make demo-fsdp` draws it, of two trainings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_every_page_are_current(page):
    assert pages.stale(page.read_text()) == [], MAKE


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.path.name)
def test_every_picture_is_current_and_shown(picture):
    assert picture.is_current(), MAKE
    text = "".join(page.read_text() for page in PAGES)
    assert picture.path.name in text, "no page shows it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_line_begins_with_the_mark_of_a_table_and_with_no_other(page):
    """Markdown would end a sentence before a line that begins with a comment."""
    text = page.read_text()
    for mark in pages.MARKED.finditer(text):
        assert text.startswith("\n", mark.start() - 1) == ("\n" in mark["text"]), mark["name"]


def test_every_block_is_on_a_page():
    assert {name for page in PAGES for name in pages.names(page.read_text())} == BLOCKS.keys()


def test_every_picture_that_is_there_is_drawn_by_something():
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("docs", "bench/results")
        for path in ROOT.glob(f"{folder}/*.png")
    }
    assert there == {picture.path.relative_to(ROOT).as_posix() for picture in PICTURES} | OTHER_PICTURES


def test_every_stored_result_is_used_and_has_a_command():
    used = {name for user in (*BLOCKS.values(), *PICTURES) for name in user.results}
    assert set(STORED) - used == set(), "no table or picture is made from these"
    assert used - set(STORED) == set(), "these are not there"
    assert stored.SOURCES.keys() == set(STORED)


@pytest.mark.parametrize("name", STORED)
def test_the_command_of_a_stored_result_is_the_one_that_made_it(name):
    command = shlex.split(stored.SOURCES[name].command)
    document = json.loads(stored.path(name).read_text())
    if command[:3] != ["python", "-m", "bench"]:
        assert command[0] == "python"
        assert (ROOT / command[1]).is_file()
        return
    args = build_parser().parse_args(command[3:])
    assert name.startswith(f"{args.command}-")
    assert name.endswith(f"-{args.tag}")
    for setting, value in document["settings"].items():
        asked = getattr(args, setting, None)
        if isinstance(asked, (bool, int, float, str)):
            assert asked == value, f"--{setting}"
    if "sets" in document and "sets" in args:
        assert [entry["name"] for entry in document["sets"]] == [entry.name for entry in args.sets]


def test_no_table_of_times_is_written_by_hand():
    with_times = {page.name for page in PAGES if A_TIME.search(pages.MARKED.sub("", page.read_text()))}
    assert with_times == WITHOUT_A_RESULT


# That what is not current is noticed


@pytest.fixture
def one_block(monkeypatch, tmp_path):
    """A page with a block that a result in a folder of its own decides."""
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    monkeypatch.setattr(stored, "SOURCES", {"run": stored.Source("python -m bench run", "agrees", measured=False)})
    monkeypatch.setattr(registry, "BLOCKS", {})
    monkeypatch.setattr(pages, "BLOCKS", registry.BLOCKS)
    registry.block("table", "run")(lambda run: ["| a |", "| --- |", f"| {run['value']} |"])
    registry.block("word", "run")(lambda run: str(run["value"]))
    stored.path("run").write_text('{"value": 1, "machine": {}}')
    page = tmp_path / "page.md"
    page.write_text(
        "It is <!-- figures: word --><!-- end of figures -->.\n<!-- figures: table --><!-- end of figures -->\n"
    )
    picture = Picture(tmp_path / "run.png", draw, ("run",))
    monkeypatch.setattr(pages, "pages", lambda: [page])
    monkeypatch.setattr(all_pictures, "PICTURES", [picture])
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    return page


def draw(run):
    made = Figure()
    made.text(0.5, 0.5, str(run["value"]))
    return made


def test_the_command_names_what_is_not_current_and_mends_it(one_block, capsys):
    folder = one_block.parent
    every = ["page.md: word", "page.md: table", "run.png"]
    assert main(["figures", "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [*every, "3 not current"]
    assert not (folder / "run.png").exists()
    assert main(["figures"]) == 0
    assert capsys.readouterr().out.splitlines() == [*every, "3 written anew"]
    assert one_block.read_text() == (
        "It is <!-- figures: word -->1<!-- end of figures -->.\n"
        "<!-- figures: table -->\n\n| a |\n| --- |\n| 1 |\n\n"
        "`python -m bench run`; agrees.\n\n<!-- end of figures -->\n"
    )
    made = {path: path.stat().st_mtime_ns for path in (one_block, folder / "run.png")}
    for arguments in (["--check"], []):
        assert main(["figures", *arguments]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what is current is left alone"
    stored.path("run").write_text('{"value": 2, "machine": {}}')
    assert main(["figures", "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [*every, "3 not current"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "missing or damaged"),
        ('{"value": 1, "mach', "missing or damaged"),
        ('{"value": 1, "machine": {}, "complete": false}', "not complete"),
    ],
)
def test_results_that_are_none_change_nothing(one_block, capsys, text, told):
    before = one_block.read_text()
    path = stored.path("run")
    path.unlink() if text is None else path.write_text(text)
    said = refusal(["figures"], capsys)
    assert f"{path} is {told}" in said
    assert "run `python -m bench run`, whose result it is" in said
    assert one_block.read_text() == before


def test_a_figure_that_is_changed_by_hand_is_noticed(one_block):
    text = pages.filled(one_block.read_text())
    assert pages.stale(text) == []
    assert pages.stale(text.replace("| 1 |", "| 0.9 |")) == ["table"]
    assert pages.stale(text.replace("-->1<", "-->0.9<")) == ["word"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- figures: taable --><!-- end of figures -->", "no block 'taable': allowed are table, word"),
        ("<!-- figures: table -->", "1 marks .* and 0 marks"),
        ("<!-- figures: table --><!-- figures: word --><!-- end of figures -->", "2 marks .* and 1 marks"),
        ("<!-- figures: table --><!-- end of figures --><!-- end of figures -->", "1 marks .* and 2 marks"),
        ("<!-- figures: table --><!-- figures: word --><!-- end of figures --><!-- end of figures -->", "2 marks"),
    ],
)
def test_marks_that_are_wrong_are_refused(one_block, text, told):
    for look in (pages.names, pages.stale, pages.filled):
        with pytest.raises(ValueError, match=told):
            look(text)


def test_a_block_has_one_function(one_block):
    with pytest.raises(ValueError, match="two blocks 'table'"):
        registry.block("table")(lambda: "")


def test_a_picture_is_of_its_results_and_of_the_code_that_drew_it(one_block, monkeypatch):
    (picture,) = all_pictures.PICTURES
    assert not picture.is_current(), "it is not there"
    picture.save()
    assert picture.is_current()
    draw(json.loads(stored.path("run").read_text())).savefig(picture.path)
    assert not picture.is_current(), "it does not say what it was drawn from"
    picture.save()
    whole = picture.path.read_bytes()
    for kept in (0, 20, len(whole) // 2):
        picture.path.write_bytes(whole[:kept])
        assert not picture.is_current(), "it was cut off"
    picture.save()
    monkeypatch.setattr(pictures.inspect, "getfile", lambda draw: pictures.__file__)
    assert not picture.is_current(), "other code drew it"
