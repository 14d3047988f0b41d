"""`python -m bench sweep`: every size with every number of tensors, and the picture of the bandwidths."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarks import refusal

from bench.__main__ import main
from bench.commands import sweep
from bench.measuring import stats
from bench.measuring.clocks import Timing
from bench.measuring.steps import Settings, StepBench
from bench.reporting import results, sweep_chart
from bench.reporting.results import SetResult
from bench.workloads import contenders
from bench.workloads.contenders import BY_NAME, YARDSTICK
from bench.workloads.shapes import ModelSet, model_set


def test_points_are_every_size_with_every_number_of_tensors_if_each_gets_an_element() -> None:
    names = [model.name for model in sweep.points([4, 1, 1], [64, 2, 1000])]
    assert names == ["1x2", "1x64", "1x1000", "4x16", "4x250"]
    assert [model.name for model in sweep.points([3], [10, 9])] == ["3x3"], "and no set twice"


def test_the_default_points_are_few_and_their_contenders_exist() -> None:
    models = list(sweep.points(sweep.COUNTS, sweep.ELEMENTS))
    assert len(models) == len(sweep.COUNTS) * len(sweep.ELEMENTS) == 24
    assert max(model.elements for model in models) == 4**12
    assert {*sweep.CONTENDERS} < BY_NAME.keys()


def result_of(name: str, seconds: dict[str, float], copy: float) -> SetResult:
    """A point's result from each contender's seconds; without one it was not measured."""
    model, yardstick = model_set(name), [Timing(1.0, 1.0)]
    rows = [results.row(BY_NAME["optimi-adan"], "not installed", "pip install torch-optimi")]
    for contender, second in seconds.items():
        timings = {YARDSTICK: yardstick, contender: [Timing(second, second)]}
        figures = results.figures(BY_NAME[contender], 0, timings, model, torch.float32, stats.summarize([copy]))
        rows.append(results.row(BY_NAME[contender], "measured", figures=figures))
    return SetResult(name, model.title, len(model.shapes), model.elements, stats.summarize([copy]), rows, True, None)


def test_the_picture_has_a_panel_a_count_a_line_a_contender_and_the_copy_as_roof() -> None:
    seconds = {YARDSTICK: 1e-3, "agr-adamw": 2e-3, "agr-adan": 4e-3}
    found = [result_of(name, seconds, copy) for name, copy in (("1x1000", 1e9), ("1x4000", 2e9), ("8x500", 3e9))]
    machine = {"device": "cpu", "threads": 1, "device_name": "a machine", "versions": {"torch": "2"}}
    run = {"machine": machine, "settings": {"dtype": "float32"}, "sets": [asdict(result) for result in found]}
    figure = sweep_chart.figure(run)
    assert figure.get_suptitle().endswith("a machine, 1 thread(s), float32, torch 2")
    first, second = figure.axes
    lines = {str(line.get_label()): line for line in first.get_lines()}
    assert [*lines] == ["torch AdamW, fused", "agr_cuda AdamW", "agr_cuda Adan", "copy of large tensors"]
    assert [*lines["agr_cuda AdamW"].get_xdata()] == [1000, 4000]
    assert [*lines["agr_cuda AdamW"].get_ydata()] == pytest.approx([28e3 / 2e-3 / 1e9, 112e3 / 2e-3 / 1e9])
    assert [*second.get_lines()[2].get_ydata()] == pytest.approx([44 * 4000 / 4e-3 / 1e9])
    for panel in figure.axes:
        assert [*panel.get_lines()[-1].get_ydata()] == [2.0, 2.0], "the median of all points' copies"
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    looks = {(line.get_color(), line.get_marker()) for line in first.get_lines()}
    assert len(looks) == 4, "no two lines look alike"


def test_all_contenders_have_lines_that_differ() -> None:
    rows = [results.row(entry, "measured") for entry in BY_NAME.values() if not entry.format]
    looks = [(style["color"], style["marker"]) for style in sweep_chart.styles(rows).values()]
    assert len({*looks}) == len(looks)


def arguments(folder: Path, *more: str) -> list[str]:
    always = ["sweep", "--device", "cpu", "--threads", "1", "--rounds", "2", "--seconds", "0.1"]
    return [*always, "--out", str(folder), "--tag", "tiny", *more]


@pytest.mark.usefixtures("threads")
def test_sweep_measures_every_point_and_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)
    monkeypatch.setattr("bench.measuring.steps.COPY_MEBIBYTES", {"cpu": 1})
    names = ["agr-adamw", "deepspeed-adamw", "agr-adan-triton"]
    sizes = ["--counts", "1", "3", "--elements", "30", "2"]
    assert main(arguments(tmp_path, *sizes, "--contenders", *names)) == 0
    document = json.loads((tmp_path / "sweep-cpu-tiny.json").read_text())
    assert [(entry["tensors"], entry["elements"]) for entry in document["sets"]] == [(1, 2), (1, 30), (3, 30)]
    for entry in document["sets"]:
        assert [row["name"] for row in entry["rows"]] == ["agr-adamw", YARDSTICK, "deepspeed-adamw"]
        assert [row["status"] for row in entry["rows"]] == ["measured", "measured", "not installed"]
        assert entry["copy"]["median"] > 0
    figures = document["sets"][1]["rows"][0]["figures"]
    assert figures["step_s"]["count"] == 2
    assert figures["bytes_per_second"] == pytest.approx(28 * 30 / figures["step_s"]["median"], rel=1e-4)
    assert document["settings"]["left_out"] == {"for a GPU alone": ["agr-adan-triton"]}
    assert (tmp_path / "sweep-cpu-tiny.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert shown.count("deepspeed CPUAdam, AdamW: not installed: pip install deepspeed") == 1
    assert "A step of 3 equal tensors" in shown
    assert "Not measured, for a GPU alone: agr-adan-triton." in shown


@pytest.mark.usefixtures("threads")
def test_points_share_the_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    measured = result_of("2x5", {YARDSTICK: 1.0}, 1e9)

    class Idle(StepBench):
        def __init__(self, settings: Settings, entries: list[contenders.Contender]) -> None:
            seen.append(settings)

        def measure_set(self, model: ModelSet, log: object) -> SetResult:
            return measured

    monkeypatch.setattr(sweep, "StepBench", Idle)
    main(arguments(tmp_path, "--counts", "1", "2", "--elements", "10", "20", "--seconds", "8"))
    assert [settings.seconds for settings in seen] == [2.0]


def test_sizes_that_leave_no_element_for_a_tensor_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(arguments(tmp_path, "--counts", "10", "20", "--elements", "9", "3"), capsys)
    assert all(part in message for part in ("--elements", "9", "--counts", "at least 10"))


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--counts", "0", "at least 1"),
        ("--elements", "1e6", "at least 1"),
        ("--seconds", "nan", "above 0"),
        ("--contenders", "lion", "deepspeed-adamw"),
        ("--dtype", "int8", "float32"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(arguments(tmp_path, f"{option}={value}"), capsys)
    assert all(part in message for part in (option, repr(value), allowed))
