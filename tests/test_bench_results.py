"""What the benchmarks show and store: rows, comparisons, targets, tables, and documents."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.measuring import stats
from bench.measuring.clocks import Timing
from bench.reporting import documents, pictures, plain, results, step_chart, tables, targets
from bench.reporting.terminal import PLAIN_WIDTH
from bench.reporting.units import duration
from bench.workloads import shapes
from bench.workloads.contenders import BY_NAME, YARDSTICK

# Results and targets


def result_of(name: str, times: dict[str, tuple[int, list[float]]], other_work: float = 0.0) -> results.SetResult:
    """A set's result from each contender's batch and seconds a round; the yardstick takes 1 s."""
    model = shapes.model_set(name)
    copy = stats.summarize([1e9])
    rows = []
    batches: dict[int, dict[str, list[Timing]]] = {}
    for contender, (batch, seconds) in times.items():
        timings = batches.setdefault(batch, {YARDSTICK: [Timing(1.0, 0.1)] * len(seconds)})
        timings[contender] = [Timing(second, second / 10) for second in seconds]
    for contender, (batch, _) in times.items():
        figures = results.figures(BY_NAME[contender], batch, batches[batch], model, torch.float32, copy)
        rows.append(results.row(BY_NAME[contender], "measured", figures=figures))
    return results.SetResult(name, model.title, len(model.shapes), model.elements, copy, rows, True, other_work)


def test_a_row_counts_the_bytes_that_its_rule_must_move() -> None:
    result = result_of("10x1000", {"agr-adamw": (0, [2.0, 2.0]), "agr-adan": (0, [4.0, 4.0])})
    adamw, adan = result.figures("agr-adamw"), result.figures("agr-adan")
    assert adamw
    assert adan
    assert adamw.bytes_per_element == 28
    assert adamw.bytes_per_second == 28 * 10_000 / 2.0
    assert adamw.share_of_copy == 28 * 10_000 / 2.0 / 1e9
    assert adan.bytes_per_element == 44
    for name in ("agr-gradients", "torch-clip-grad-norm"):
        assert BY_NAME[name].bytes_per_element(torch.float32) == 8
    assert adan.ratio == stats.Summary(4.0, 4.0, 4.0, 4.0, 2)


def test_a_row_tells_time_for_each_byte_of_its_format_and_masters_are_judged_by_it() -> None:
    times = {YARDSTICK: (0, [1.0]), "agr-adamw-bfloat16": (0, [1.0]), "agr-adamw-bfloat16-master": (0, [1.2])}
    result = result_of("gpt2", times)
    half, masters = result.figures("agr-adamw-bfloat16"), result.figures("agr-adamw-bfloat16-master")
    assert half
    assert masters
    assert (half.bytes_per_element, half.ratio_per_byte) == (14, 2.0)
    assert (masters.bytes_per_element, masters.ratio_per_byte) == (28, 1.2)
    # On a CPU the gradient's two bytes are read twice: 30 bytes at 1.2 times the time of 28 are 1.12 a byte.
    for device, value, verdict in (("cpu", 1.12, "met"), ("cuda", 1.2, "missed")):
        (target,) = (target for target in targets.judge([result], device) if "masters" in target.text)
        assert (target.limit, target.measured, target.verdict) == (1.15, pytest.approx(value), verdict)


def test_a_comparison_pairs_rounds_within_a_batch_and_uses_the_yardstick_across() -> None:
    times = {"agr-adan": (0, [1.0, 2.0, 6.0]), "reference-adan": (0, [2.0, 8.0, 12.0])}
    assert results.compare(result_of("3x4", times), "agr-adan", "reference-adan") == results.Comparison(0.5, 0.5)
    times["reference-adan"] = (1, [2.0, 8.0, 12.0])
    assert results.compare(result_of("3x4", times), "agr-adan", "reference-adan") == results.Comparison(0.25, 0.5)
    assert results.compare(result_of("3x4", times), "agr-adan", "optimi-adan") is None


def test_cpu_targets_are_judged() -> None:
    gpt2 = result_of(
        "gpt2",
        {
            YARDSTICK: (0, [1.0] * 3),
            "agr-adamw": (0, [1.14, 1.15, 1.30]),
            "agr-adan": (0, [1.5, 2.0, 2.5]),
            "reference-adan": (0, [10.0, 12.0, 10.0]),
            "optimi-adan-foreach": (0, [5.0, 5.0, 5.0]),
        },
    )
    verdicts = [target.verdict for target in targets.judge([gpt2], "cpu")]
    assert verdicts == ["met", "not measured", "met", "missed, but met by the fastest steps"]

    busy = result_of("321x64", {YARDSTICK: (0, [1.0]), "agr-adamw": (0, [0.1])}, other_work=0.5)
    assert targets.judge([busy], "cpu")[1].verdict == "met, on a busy machine"


def test_gpu_targets_are_judged() -> None:
    times = {YARDSTICK: (0, [1.0]), "agr-adamw": (0, [1.01]), "agr-adan": (0, [5.0])}
    judged = targets.judge([result_of("gpt2", times), result_of("321x64", times)], "cuda")
    verdicts = {target.text: target.verdict for target in judged}
    assert verdicts == {
        "AGR-AdamW, GPT-2 124M: share of the copy bandwidth at 28 bytes": "met",
        "AGR-Adan, GPT-2 124M: share of the copy bandwidth at 44 bytes": "met",
        "AGR-AdamW, GPT-2 124M, against torch's fused AdamW": "missed",
        "AGR-AdamW, 321 tensors of 64, against torch's fused AdamW": "missed",
        "AGR-AdamW, 321 tensors of 64: host time against torch's fused AdamW": "missed",
        "AGR-AdamW, 321 tensors of 64: kernel launches a step": "not measured",
        "AGR-AdamW by Triton, GPT-2 124M, against the cuda backend": "not measured",
        "AGR-AdamW by Triton, GPT-2 124M, against optimi's Triton AdamW": "not measured",
        "AGR-Adan by Triton, GPT-2 124M, against the cuda backend": "not measured",
        "AGR-Adan by Triton, GPT-2 124M, against optimi's Triton Adan": "not measured",
    }


def test_tritons_targets_are_judged_on_large_models_against_cuda_and_optimi() -> None:
    gpt2 = {
        YARDSTICK: (0, [1.0] * 2),
        "agr-adamw": (0, [0.8] * 2),
        "agr-adamw-triton": (0, [1.0] * 2),
        "optimi-adamw-triton": (1, [0.9] * 2),
        "agr-adan": (0, [1.0] * 2),
        "agr-adan-triton": (0, [1.3] * 2),
        "optimi-adan-triton": (0, [1.3] * 2),
    }
    small = {YARDSTICK: (0, [1.0]), "agr-adamw": (0, [0.1]), "agr-adamw-triton": (0, [0.9])}

    def judged(*measured: results.SetResult) -> dict[str, tuple[float | None, str]]:
        found = targets.judge(measured, "cuda")
        return {t.text: (t.measured, t.verdict) for t in found if t.text.startswith("AGR-") and "by Triton" in t.text}

    assert judged(result_of("gpt2", gpt2), result_of("321x64", small)) == {
        "AGR-AdamW by Triton, GPT-2 124M, against the cuda backend": (1.25, "met"),
        "AGR-AdamW by Triton, GPT-2 124M, against optimi's Triton AdamW": (pytest.approx(1 / 0.9), "missed"),
        "AGR-Adan by Triton, GPT-2 124M, against the cuda backend": (1.3, "missed"),
        "AGR-Adan by Triton, GPT-2 124M, against optimi's Triton Adan": (1.0, "met"),
    }
    assert set(judged(result_of("321x64", small)).values()) == {(None, "not measured")}
    assert "AGR-Adan by Triton, 100M elements and more, against the cuda backend" in judged(result_of("321x64", small))


def test_the_table_of_a_gpu_shows_host_times_and_the_chart_is_drawn(tmp_path: Path) -> None:
    result = result_of("321x64", {YARDSTICK: (0, [0.002] * 3), "agr-adamw": (0, [0.001, 0.0005, 0.0002])})
    result.rows.append(results.row(BY_NAME["optimi-adan"], "not installed", "pip install torch-optimi"))
    console = Console(width=PLAIN_WIDTH, record=True, file=io.StringIO())
    console.print(tables.results_table(result, with_host=True))
    shown = console.export_text()
    assert "host ratio" in shown
    assert "50 us" in shown, "the host's median"
    assert "500 us" in shown, "the device's median"
    assert tables.reasons(result) == ["optimi Adan, default: pip install torch-optimi"]
    machine = {"device": "cuda:0", "device_name": "a GPU", "versions": {"torch": "2"}}
    stored, picture = tmp_path / "run.json", tmp_path / "new" / "chart.png"
    results.write(stored, machine, {"dtype": "float32"}, [result] * 4, [])
    read = map(dataclasses.asdict, results.sets_of(documents.read(stored)))
    assert list(read) == [documents.rounded(dataclasses.asdict(result))] * 4
    pictures.save(picture, step_chart.figure, stored)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_document_has_a_line_for_each_record_and_six_digits_a_number(tmp_path: Path) -> None:
    summary = {"median": 1 / 3, "count": 1234567}
    document = {
        "format": 1,
        "machine": {"cpu": "a", "backends": ["b", "c"], "load": None},
        "sets": [{"name": "s", "copy": summary, "rows": [{"label": "r", "step_s": summary}, {"label": "none"}]}],
        "targets": [],
    }
    documents.write(tmp_path / "new" / "a.json", document)
    written = (tmp_path / "new" / "a.json").read_text()
    assert json.loads(written) == documents.rounded(document)
    assert [line.strip(" ,") for line in written.splitlines()][1:-1] == [
        '"format": 1',
        *('"machine": {', '"cpu": "a"', '"backends": ["b", "c"]', '"load": null', "}"),
        *('"sets": [', "{", '"name": "s"', '"copy": {', '"median": 0.333333', '"count": 1234567', "}"),
        *('"rows": [', '{"label": "r", "step_s": {"median": 0.333333, "count": 1234567}}', '{"label": "none"}', "]"),
        *("}", "]", '"targets": []'),
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (3e-7, "0.3 us"),
        (9.994e-4, "999 us"),
        (9.996e-4, "1 ms"),
        (0.0205, "20.5 ms"),
        (0.9996, "1 s"),
        (1234.5, "1234 s"),
    ],
)
def test_durations_have_three_digits_in_the_unit_that_they_are_rounded_to(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_target_is_recorded_with_what_tables_show_of_it() -> None:
    record = targets.Target("share", 0.9, 0.951, at_least=True, unit="%").record()
    assert record["shown"] == {"limit": ">= 90.0%", "measured": "95.1%"}
    assert record["verdict"] == "met"
    assert record["measured"] == 0.951


# Without rich


def test_without_rich_tables_are_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    specification = importlib.util.find_spec("bench.reporting.terminal")
    assert specification
    assert specification.loader
    terminal = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(terminal)
    assert terminal.Table is plain.Table

    table = terminal.Table(title="Times", caption="All of them.", title_justify="left")
    table.add_column("contender", no_wrap=True)
    table.add_column("step", justify="right")
    table.add_row("[bold]ours[/]", "9 us", style="bold")
    table.add_row("a longer name", "1.25 ms")
    table.add_row("missing")
    console = terminal.console()
    console.print(table)
    console.print("[red]A warning.", highlight=False)
    console.print("[red] is a color.", markup=False)
    assert capsys.readouterr().out.splitlines() == [
        "Times",
        "contender         step",
        "-------------  -------",
        "ours              9 us",
        "a longer name  1.25 ms",
        "missing",
        "All of them.",
        "A warning.",
        "[red] is a color.",
    ]
