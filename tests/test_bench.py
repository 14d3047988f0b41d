"""The benchmark package: model shapes, statistics, interleaving, and the command line on tiny sets."""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench is a package of the repository that is not installed

from bench.__main__ import main
from bench.commands import release, sharded
from bench.measuring import clocks, races, stats
from bench.measuring.clocks import Timing
from bench.measuring.races import Lane
from bench.reporting import documents, pictures, plain, results, step_chart, tables, targets
from bench.reporting.terminal import PLAIN_WIDTH
from bench.reporting.units import duration
from bench.workloads import building, contenders, shapes
from bench.workloads.contenders import ALL, BY_NAME, PRECISION, YARDSTICK, Contender
from bench.workloads.formats import FORMATS
from bench.workloads.tensors import PrivateGradients, Workload

SHAPES = ((3, 4), (7,), (1,))


# Shapes


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("vit-b-16", 152, 86_567_656),
        ("321x64", 321, 20_544),
        ("321x4096", 321, 1_314_816),
    ],
)
def test_sets_have_the_known_sizes(name: str, tensors: int, elements: int) -> None:
    model = shapes.model_set(name)
    assert len(model.shapes) == tensors
    assert model.elements == sum(prod(shape) for shape in model.shapes) == elements


def test_models_are_in_the_order_of_their_parameters() -> None:
    gpt2, resnet50, vit = (shapes.model_set(name).shapes for name in ("gpt2", "resnet50", "vit-b-16"))
    assert gpt2[:6] == ((50257, 768), (1024, 768), (768,), (768,), (768, 2304), (2304,))
    assert gpt2[6:14] == ((768, 768), (768,), (768,), (768,), (768, 3072), (3072,), (3072, 768), (768,))
    assert resnet50[:4] == ((64, 3, 7, 7), (64,), (64,), (64, 64, 1, 1))
    assert resnet50[-2:] == ((1000, 2048), (1000,))
    assert vit[:4] == ((1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768))
    assert vit[6:10] == ((2304, 768), (2304,), (768, 768), (768,))


@pytest.mark.parametrize("name", ["llama", "0x64", "3x0", "3x", "x4", "3x4x5", "-3x4", ""])
def test_other_names_of_sets_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="allowed are gpt2, resnet50, vit-b-16, or COUNTxELEMENTS"):
        shapes.model_set(name)


# Statistics


def test_summary_of_known_numbers() -> None:
    assert stats.summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == stats.Summary(3.0, 2.0, 4.0, 1.0, 5)
    assert stats.summarize([1.0, 2.0, 3.0, 4.0]) == stats.Summary(2.5, 1.75, 3.25, 1.0, 4)
    assert stats.summarize([7.0]) == stats.Summary(7.0, 7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        stats.summarize([])


def test_a_medians_interval_has_the_ranks_of_the_sign_test() -> None:
    """Those of statistical tables: 1 and 6 of 6 values, 2 and 9 of 10, 40 and 61 of 100."""
    assert stats.median_interval([]) is None
    assert stats.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    for count, lower, upper in ((6, 1, 6), (10, 2, 9), (100, 40, 61)):
        values = [float(value) for value in range(count, 0, -1)]
        assert stats.median_interval(values) == (lower, upper)
    assert stats.median_interval([1.0] * 2000) == (1.0, 1.0)


def test_paired_ratios_cancel_drift_that_the_ratio_of_medians_does_not() -> None:
    yardstick = [1.0, 1.0, 10.0, 10.0, 10.0]
    values = [2.0, 2.0, 20.0, 20.0, 30.0]
    assert stats.paired_ratios(values, yardstick) == stats.Summary(2.0, 2.0, 2.0, 2.0, 5)
    assert stats.ratio_of_medians([3.0, 3.0, 9.0], [1.0, 6.0, 6.0]) == 0.5
    assert stats.paired_ratios([3.0, 3.0, 9.0], [1.0, 6.0, 6.0]).median == 1.5
    assert stats.ratio_of_fastest([3.0, 2.0, 9.0], [8.0, 6.0, 4.0]) == 0.5
    with pytest.raises(ValueError, match="got 1 and 2"):
        stats.paired_ratios([1.0], [1.0, 2.0])


# Interleaving


def test_a_race_visits_every_lane_once_a_round_in_changing_order() -> None:
    log: list[str] = []
    lanes = [Lane(name, lambda name=name: log.append(name)) for name in "abcd"]
    counter = iter(range(1000))

    def clock(action: clocks.Action) -> Timing:
        action()
        return Timing(float(next(counter)), 0.0)

    timings = races.race(
        lanes, clock, rounds=20, seconds=1e-9, new_round=lambda number: log.append(f"<{number}"),
        between=lambda: log.append(">"),
    )  # fmt: skip
    assert len(log) == races.FEWEST_ROUNDS * 6, "time was up at once, so the fewest rounds are taken"
    rounds = [log[begin : begin + 6] for begin in range(0, len(log), 6)]
    assert [(r[0], r[-1]) for r in rounds] == [(f"<{number}", ">") for number in range(len(rounds))]
    assert all(sorted(r[1:5]) == list("abcd") for r in rounds)
    for number, r in enumerate(rounds):
        for name in "abcd":
            assert timings[name][number].step == 4 * number + r[1:5].index(name)

    log.clear()
    races.race(lanes, clock, rounds=20, seconds=60, new_round=lambda number: None)
    assert len({tuple(log[begin : begin + 4]) for begin in range(0, 80, 4)}) > 5


def test_the_collector_is_off_in_a_race_and_on_again_after_it() -> None:
    import gc

    states: list[bool] = []
    lane = Lane("a", lambda: states.append(gc.isenabled()))
    races.race([lane], clocks.cpu_clock, rounds=2, seconds=1, new_round=lambda number: None)
    assert states == [False, False]
    assert gc.isenabled()


def test_a_lane_undoes_its_surroundings_where_its_step_fails() -> None:
    def fail() -> None:
        raise RuntimeError("no step")

    log: list[str] = []
    lane = Lane("a", fail, before=lambda: log.append("before"), after=lambda: log.append("after"))
    with pytest.raises(RuntimeError, match="no step"):
        lane.visit(clocks.cpu_clock)
    assert log == ["before", "after"]


def test_rounds_take_two_sets_of_gradients_in_turn() -> None:
    workload = Workload(SHAPES, torch.device("cpu"), torch.float32)
    first = [parameter.grad for parameter in workload.parameters]
    workload.turn(1)
    second = [parameter.grad for parameter in workload.parameters]
    workload.turn(2)
    assert all(p.grad is g for p, g in zip(workload.parameters, first, strict=True))
    assert not any(a is b for a, b in zip(first, second, strict=True))
    assert [tuple(parameter.shape) for parameter in workload.parameters] == list(SHAPES)


def test_private_gradients_are_restored_and_the_shared_ones_left_alone() -> None:
    workload = Workload(SHAPES, torch.device("cpu"), torch.float32)
    expected = [gradient.clone() for gradient in workload.gradients]
    private = PrivateGradients(workload)
    for _ in range(2):
        private.lend()
        for parameter, value in zip(workload.parameters, expected, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, value)
            parameter.grad.zero_()
        private.take_back()
        for parameter, gradient in zip(workload.parameters, workload.gradients, strict=True):
            assert parameter.grad is gradient
        assert all(map(torch.equal, workload.gradients, expected))


# Contenders


def built_or_skipped(contender: Contender, workload: Workload) -> Any:
    """A contender's step. A peer that is not installed here has nothing to test."""
    try:
        return contender.build(list(workload.parameters), 1e-8)
    except building.LeftOutError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated:DeprecationWarning")  # optimi's
@pytest.mark.parametrize("contender", ALL, ids=lambda contender: contender.name)
def test_contenders_train_and_write_gradients_only_where_declared(
    contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(
        torch, "compile", lambda function: function
    )  # which takes half a minute, and changes nothing here
    workload = Workload(((8, 4), (64,)), torch.device("cpu"), torch.float32)
    for gradient in workload.gradients:
        gradient.mul_(1e3)  # more than what is clipped to
    step = built_or_skipped(contender, workload)
    gradients = [gradient.clone() for gradient in workload.gradients]
    parameters = [parameter.detach().clone() for parameter in workload.parameters]
    for _ in range(3):
        step()
    changed = not all(map(torch.equal, gradients, workload.gradients))
    assert changed == contender.writes_gradients
    assert workload.finite()
    for parameter, before in zip(workload.parameters, parameters, strict=True):
        assert torch.equal(parameter, before) == (contender.rule == "gradients")
        torch.testing.assert_close(parameter.detach(), before, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated:DeprecationWarning")  # optimi's
@pytest.mark.parametrize("contender", PRECISION, ids=lambda contender: contender.name)
def test_contenders_with_formats_take_the_step_of_adamw_or_adan(
    contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(building, "LEARNING_RATE", 0.01)  # more than bfloat16 rounds away
    assert contender.format
    workload = Workload(((64, 64), (8,)), torch.device("cpu"), contender.format.parameter)
    before = [parameter.detach().clone() for parameter in workload.parameters]
    step = built_or_skipped(contender, workload)
    step()
    for parameter, value, gradient in zip(workload.parameters, before, workload.gradients, strict=True):
        # A first step goes by the learning rate against the gradient, but for weight decay.
        torch.testing.assert_close(parameter.detach(), value - 0.01 * gradient.sign(), atol=2e-3, rtol=0)
    if contender.ours:
        state = step.__self__.state[workload.parameters[0]]
        key = "exp_avg_codes" if contender.format.state == torch.uint8 else "exp_avg"
        assert state[key].dtype == contender.format.state
        assert ("master_param" in state) == contender.format.master


def test_formats_move_the_bytes_of_the_documentation() -> None:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
    lines = (ROOT / "docs" / "precision.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.endswith((" yes |", "ic |"))
    ]
    documented = {tuple(row[:4]): (int(row[5]), int(row[6])) for row in rows if len(row) == 8 and row[5].isdigit()}
    checked = 0
    for stored in FORMATS.values():
        master = "yes" if stored.master else ""
        row = (names[stored.parameter], names[stored.gradient], names.get(stored.state, "8 bits"), master)
        scales = (0.0625, 0.125) if stored.state == torch.uint8 else (0, 0)
        if row in documented:
            checked += 1
            moved = stored.bytes_moved("AdamW") - scales[0], stored.bytes_moved("Adan") - scales[1]
            assert moved == documented[row], row
    assert checked == 10


def test_on_a_gpu_rows_ask_for_their_backend_and_say_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def why_not(backend: str, tensor: torch.Tensor) -> str:
        asked.append(backend)
        return "it was not built"

    monkeypatch.setattr(contenders, "why_not", why_not)
    parameters: Any = [SimpleNamespace(is_cuda=True)]
    for name in ("agr-adamw", "agr-adan-off", "agr-adamw-triton", "agr-adan-triton", "agr-gradients-triton"):
        with pytest.raises(building.LeftOutError, match=r"no (cuda|triton) backend: it was not built") as left_out:
            BY_NAME[name].build(parameters, 1e-8)
        assert left_out.value.status == "not available"
    assert asked == ["cuda", "cuda", "triton", "triton", "triton"]


@pytest.mark.parametrize("rule", ["AdamW", "Adan"])
def test_optimi_is_asked_for_its_triton_kernels_if_it_has_them(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(parameters: object, lr: float, eps: float, weight_decay: float, foreach: object = None) -> None:
        raise AssertionError("it has no such option")

    def having(parameters: object, triton: bool | None = None, **options: object) -> object:
        assert triton
        raise ImportError("Triton could not be imported on this system.")

    for maker, message in ((without, "torch-optimi>=0.3"), (having, "could not be imported")):
        monkeypatch.setitem(sys.modules, "optimi", SimpleNamespace(**{rule: maker}))
        with pytest.raises(building.LeftOutError, match=message) as left_out:
            BY_NAME[f"optimi-{rule.lower()}-triton"].build([], 1e-8)
        assert left_out.value.status == "not available"


@pytest.mark.parametrize("name", ["reference-adamw", "reference-adan"])
def test_the_reference_rows_are_plain_foreach_operations(name: str) -> None:
    workload = Workload(((8, 4), (64,)), torch.device("cpu"), torch.float32)
    step = BY_NAME[name].build(list(workload.parameters), 1e-8)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    called = {event.name for event in profiler.events() or ()}
    assert {"aten::_foreach_lerp_", "aten::_foreach_addcdiv_"} <= called


def test_batches_fit_the_budget_and_keep_targets_sides_together() -> None:
    gpt2 = 4 * 124_439_808
    on_cpu, on_gpu = ([entry for entry in ALL if kind in entry.devices] for kind in ("cpu", "cuda"))
    for entries in (on_cpu, on_gpu):
        assert [len(batch) for batch in contenders.batches(entries, gpt2, 64 * 2**30)] == [len(entries)]
    for entries, gibibytes, count in ((on_cpu, 20, 4), (on_cpu, 16, 5), (on_cpu, 10, 8), (on_gpu, 16, 5)):
        budget = gibibytes * 2**30
        batches = contenders.batches(entries, gpt2, budget)
        assert len(batches) == count
        assert all(contenders.bytes_needed(batch, gpt2) <= budget for batch in batches)
        assert all(batch[0].name == YARDSTICK for batch in batches)
        others = [entry for batch in batches for entry in batch[1:]]
        assert sorted(entry.name for entry in [BY_NAME[YARDSTICK], *others]) == sorted(e.name for e in entries)

    def names(entries: list[Contender], gibibytes: int) -> list[set[str]]:
        return [{entry.name for entry in batch} for batch in contenders.batches(entries, gpt2, gibibytes * 2**30)]

    assert any({"agr-adan", "reference-adan", "optimi-adan-foreach"} <= batch for batch in names(on_cpu, 16))
    for rule in ("adamw", "adan"):
        together = {f"agr-{rule}", f"agr-{rule}-triton"}
        assert any(together <= batch for batch in names(on_gpu, 10))
        assert any({*together, f"optimi-{rule}-triton"} <= batch for batch in names(on_gpu, 16))
    assert contenders.batches([BY_NAME[YARDSTICK]], gpt2, 1) == [[BY_NAME[YARDSTICK]]]


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


# The command line


def tiny(folder: Path, *more: str) -> list[str]:
    """Arguments of a run that takes a moment."""
    always = ["step", "--device", "cpu", "--rounds", "2", "--copy-mebibytes", "1", "--threads", "1"]
    return [*always, "--out", str(folder), "--tag", "tiny", *more]


def written(folder: Path) -> dict[str, Any]:
    """The JSON of a tiny run, having checked that a chart lies beside it."""
    assert (folder / "step-cpu-float32-tiny.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    document: dict[str, Any] = json.loads((folder / "step-cpu-float32-tiny.json").read_text())
    return document


def test_step_writes_every_contender_and_a_chart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", *tiny(tmp_path, "--sets", "3x16", "2x100")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Targets" in done.stdout
    document = written(tmp_path)
    assert "agr-adan-triton" in document["settings"]["left_out"]["for a GPU alone"]
    assert "Not measured, for a GPU alone: agr-adamw-triton, " in done.stdout
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert document["machine"]["threads"] == 1
    assert [entry["name"] for entry in document["sets"]] == ["3x16", "2x100"]
    for entry in document["sets"]:
        assert entry["parameters_finite"]
        assert entry["copy"]["median"] > 0
        on_cpu = [contender.name for contender in ALL if "cpu" in contender.devices and not contender.compiles]
        assert [row["name"] for row in entry["rows"]] == on_cpu
        for row in entry["rows"]:
            if row["status"] == "measured":
                figures = row["figures"]
                assert figures["step_s"]["count"] == 2
                assert "samples" not in figures
                assert figures["step_s"]["lower"] <= figures["step_s"]["median"] <= figures["step_s"]["upper"]
                assert figures["ratio"]["median"] > 0
            else:
                assert "pip install" in row["reason"]
    lines = (tmp_path / "step-cpu-float32-tiny.json").read_text().splitlines()
    assert len(lines) < 150, "a row a line"
    assert not list(tmp_path.glob("*.samples.json"))


@pytest.mark.usefixtures("threads")
def test_formats_share_a_run_and_its_yardstick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchao", "torchao.optim"):  # the second, too, where something has imported it
        monkeypatch.setitem(sys.modules, module, None)
    assert main(tiny(tmp_path, "--sets", "3x4096", "--precision")) == 0
    (found,) = json.loads((tmp_path / "step-cpu-precision-tiny.json").read_text())["sets"]
    rows = {row["name"]: row for row in found["rows"]}
    on_cpu = {contender.name for contender in PRECISION if "cpu" in contender.devices}
    assert rows.keys() == {YARDSTICK, "agr-adamw", *on_cpu}
    assert rows["agr-adamw-bfloat16-master"]["figures"]["against"].keys() == {"torch-adamw-fused-master"}
    assert rows["agr-adan-float32-8bit"]["figures"]["bytes_per_element"] == 20.125
    assert "pip install torchao" in rows["torchao-adamw-float32-8bit"]["reason"]


@pytest.mark.usefixtures("threads")
def test_samples_that_are_asked_for_lie_beside_the_summary_and_say_the_same(tmp_path: Path) -> None:
    name = "torch-adamw-foreach"
    assert main(tiny(tmp_path, "--sets", "3x16", "--contenders", name, "--samples")) == 0
    (rows,) = ({row["name"]: row["figures"] for row in entry["rows"]} for entry in written(tmp_path)["sets"])
    (found,) = json.loads((tmp_path / "step-cpu-float32-tiny.samples.json").read_text())["sets"]
    (batch,) = found["batches"]
    steps = {entry["contender"]: [step for step, _ in entry["samples"]] for entry in batch}
    assert found["set"] == "3x16"
    assert steps.keys() == rows.keys() == {name, YARDSTICK}
    for contender, seconds in steps.items():
        assert rows[contender]["step_s"]["median"] == pytest.approx(stats.summarize(seconds).median, rel=1e-4)
        ratio = stats.paired_ratios(seconds, steps[YARDSTICK]).median
        assert rows[contender]["ratio"]["median"] == pytest.approx(ratio, rel=1e-4)
    ignored = (ROOT / "bench" / ".gitignore").read_text().splitlines()
    assert "*.samples.json" in ignored, "they stay out of the repository"


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--sets", "gpt5", "gpt2, resnet50, vit-b-16, or COUNTxELEMENTS"),
        ("--contenders", "lion", "torch-adamw-fused"),
        ("--device", "tpu", "cpu, cuda and cuda:INDEX"),
        ("--rounds", "0", "at least 1"),
        ("--seconds", "-1", "above 0"),
        ("--tag", "../x", "letters, digits"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(tiny(tmp_path, f"{option}={value}"))
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("latency", x) for x in ("--gpus=h900", "--sets=gpt5", "--rules=SGD", "--dtype=float64", "--kernels=2.0")),
        *(("traffic", x) for x in ("--sets=gpt5", "--l2=0", "--blocks=-1", "--share=0", "--dtype=int8", "--tag=../x")),
    ],
)
def test_bad_arguments_of_a_prediction_are_refused_by_name(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, option])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    name, _, value = option.partition("=")
    assert name in message
    assert repr(value) in message


@pytest.mark.usefixtures("threads")
def test_a_missing_peer_gets_a_row_that_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optimi", None)
    assert main(tiny(tmp_path, "--sets", "3x16", "--contenders", "optimi-adan", "torch-adamw-foreach")) == 0
    rows = {row["name"]: row for row in written(tmp_path)["sets"][0]["rows"]}
    assert rows["optimi-adan"]["status"] == "not installed"
    assert "pip install torch-optimi" in rows["optimi-adan"]["reason"]
    assert rows["torch-adamw-foreach"]["status"] == rows[YARDSTICK]["status"] == "measured"
    assert "pip install torch-optimi" in capsys.readouterr().out


@pytest.mark.usefixtures("threads")
def test_a_missing_backend_gets_a_row_that_says_why_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "agr-adamw-triton"
    monkeypatch.setattr(contenders, "why_not", lambda backend, tensor: f"{backend} is elsewhere")
    here = dataclasses.replace(BY_NAME[name], devices=("cpu",))
    monkeypatch.setattr(contenders, "ALL", (BY_NAME[YARDSTICK], here))
    assert main(tiny(tmp_path, "--sets", "3x16", "--contenders", name)) == 0
    rows = {row["name"]: row for row in written(tmp_path)["sets"][0]["rows"]}
    assert (rows[name]["status"], rows[name]["reason"]) == ("not available", "no triton backend: triton is elsewhere")
    assert "agr_cuda AdamW, Triton: no triton backend: triton is elsewhere" in capsys.readouterr().out


@pytest.mark.usefixtures("threads")
def test_a_failing_contender_gets_a_row_with_its_error_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(parameters: building.Parameters, eps: float) -> building.Step:
        raise RuntimeError("out of order")

    name = "torch-adamw-foreach"
    broken = dataclasses.replace(BY_NAME[name], build=fail)
    monkeypatch.setattr(contenders, "ALL", (BY_NAME[YARDSTICK], broken))
    assert main(tiny(tmp_path, "--sets", "3x16", "--contenders", name)) == 1
    rows = {row["name"]: row for row in written(tmp_path)["sets"][0]["rows"]}
    assert rows[name]["status"] == "failed"
    assert rows[name]["reason"] == "RuntimeError: out of order"
    assert rows[YARDSTICK]["status"] == "measured"


@pytest.mark.usefixtures("threads")
def test_release_measures_every_way_and_all_train(tmp_path: Path) -> None:
    pytest.importorskip("optimi")
    sizes = ["--tensors", "3", "--elements", "6", "--steps", "2"]
    assert main(["release", "--device", "cpu", *sizes, "--out", str(tmp_path), "--tag", "tiny"]) == 0
    document = json.loads((tmp_path / "release-cpu-tiny.json").read_text())
    assert [row["label"] for row in document["rows"]] == list(release.CONTENDERS)
    assert all(row[key]["count"] == 2 for row in document["rows"] for key in ("host_s", "ratio"))

    args = argparse.Namespace(device=torch.device("cpu"), dtype="float32", tensors=2, elements=4)
    for make in release.CONTENDERS.values():
        model = release.Tensors(args)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step = make(model)
        model.backward()
        step()
        for parameter, value in zip(model.parameters(), before, strict=True):
            assert parameter.grad is None
            assert not torch.equal(parameter, value)


def test_what_an_example_has_found_is_stored_without_paths_and_long_lists(tmp_path: Path) -> None:
    asked = {"threads": torch.get_num_threads(), "device": "cpu", "output": "/somewhere", "steps": 101}
    run = {"train_loss": [1 / 3] * 101, "held_out_loss": [1 / 3] * 100}
    document = {"seconds": 2 / 3, "options": asked, "environment": {}, "runs": [run] * 101}
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert main(["store", str(tmp_path / "results.json"), "name", "--out", str(tmp_path / "new")]) == 0
    stored = json.loads((tmp_path / "new" / "name.json").read_text())
    assert stored["settings"] == {name: value for name, value in asked.items() if name != "output"}
    assert stored["runs"] == [{"held_out_loss": [0.333333] * 100}] * 101
    assert stored["seconds"] == 0.666667
    assert stored["machine"]["versions"]["torch"] == torch.__version__
    assert stored.keys() == {"format", "machine", "settings", "seconds", "runs"}


@pytest.mark.usefixtures("threads")
def test_sharded_measures_every_contender_and_judges_ours(tmp_path: Path) -> None:
    sizes = ["--tensors", "5", "--elements", "6", "--steps", "3"]
    assert main(["sharded", "--device", "cpu", *sizes, "--out", str(tmp_path), "--tag", "tiny"]) == 0
    document = json.loads((tmp_path / "sharded-cpu-tiny.json").read_text())
    assert [row["label"] for row in document["rows"]] == list(sharded.CONTENDERS)
    assert all(row[key]["count"] == 3 for row in document["rows"] for key in ("host_s", "ratio", "of_plain"))
    assert document["targets"] == [], "they are stated for 321 tensors of 64"

    slow = stats.summarize([3.1])
    rows = [sharded.Row(**{**row, "host_s": None, "ratio": slow, "of_plain": slow}) for row in document["rows"]]
    judged = sharded.judge(rows)
    assert [(target.limit, target.verdict) for target in judged] == [(0.5, "missed")] * 3 + [(3.0, "missed")]
