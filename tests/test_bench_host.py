"""The host's time of a step: `bench overhead`, and with gradients that come and go, `bench gradients`."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.__main__ import main
from bench.commands import gradients, overhead
from bench.measuring import stats
from bench.workloads import building, contenders


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu backend in the place of the cuda one."""

    def ours(rule: str, backend: str) -> overhead.Entry:
        build = contenders.BY_NAME[f"agr-{rule.lower()}"].build
        return overhead.Entry(f"agr_cuda {rule}", lambda parameters: build(parameters, 1e-8), backend)

    monkeypatch.setattr(overhead, "ours", ours)
    monkeypatch.setattr(overhead, "rehearsal", contextlib.nullcontext)


def overhead_args(folder: Path, *more: str) -> list[str]:
    always = ["overhead", "--device", "cpu", "--steps", "6", "--block", "3", "--out", str(folder), "--tag", "tiny"]
    return [*always, *more]


@pytest.mark.usefixtures("threads", "rehearsed")
def test_overhead_measures_every_optimizer_with_kept_and_with_new_gradients(tmp_path: Path) -> None:
    fused = torch._fused_adamw_
    assert main(overhead_args(tmp_path)) == 0
    assert torch._fused_adamw_ is fused
    document = json.loads((tmp_path / "overhead-cpu-tiny.json").read_text())
    assert document["rehearsed"]
    labels = {row["label"] for row in document["rows"]}
    assert {(row["label"], row["gradients"]) for row in document["rows"]} == {
        (label, gradients) for label in labels for gradients in ("kept", "new")
    }
    assert {"agr_cuda AdamW", "agr_cuda Adan", "torch AdamW, fused, its operation left out"} < labels
    for row in document["rows"]:
        assert row["host_s"]["count"] == 6
        assert row["ratio"]["count"] == 2, "one for each block"
        if row["label"] == "torch AdamW, fused, its operation left out":
            assert row["ratio"]["median"] == 1.0
        if row["label"] in ("agr_cuda AdamW", "agr_cuda Adan"):
            assert row["ratio_to_whole"]["count"] == 2
        else:
            assert row["ratio_to_whole"] is None
    assert len(document["targets"]) == 4
    assert all(target["verdict"] for target in document["targets"])


@pytest.mark.usefixtures("threads", "rehearsed")
def test_overhead_judges_only_what_the_targets_are_stated_for(tmp_path: Path) -> None:
    assert main(overhead_args(tmp_path, "--tensors", "4")) == 0
    assert json.loads((tmp_path / "overhead-cpu-tiny.json").read_text())["targets"] == []


@pytest.mark.usefixtures("threads")
def test_overhead_says_that_the_cuda_backend_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "agr_cuda.cuda", None)
    assert main(overhead_args(tmp_path)) == 2
    assert "rehearsal is missing" in capsys.readouterr().out


def test_on_a_gpu_overhead_measures_the_backends_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, str | None] = {"cuda": "nvcc was not found", "triton": None}
    monkeypatch.setattr(contenders, "why_not", lambda backend, tensor: reasons[backend])
    said: list[str] = []
    assert overhead.launching(torch.empty(0), said.append) == ["triton"]
    assert said == ["No cuda backend: nvcc was not found"]
    reasons["cuda"] = None
    assert overhead.launching(torch.empty(0), said.append) == ["cuda", "triton"]
    labels = [entry.label for entry in overhead.entries(True, ["cuda", "triton"])]
    assert labels == [
        *("agr_cuda AdamW", "agr_cuda Adan", "agr_cuda AdamW, Triton", "agr_cuda Adan, Triton"),
        *("torch AdamW, fused", "torch AdamW, foreach"),
    ]


def test_the_hosts_targets_are_the_cuda_backends_alone_and_allow_more_with_new_gradients() -> None:
    one, ratio = stats.summarize([50e-6]), stats.summarize([0.14])
    rows = [
        overhead.Row(f"on {backend}", gradients, backend, one, ratio, None)
        for backend in ("cuda", "triton", "")
        for gradients in ("kept", "new")
    ]
    judged = overhead.judge(rows, True)
    assert [(target.limit, target.verdict) for target in judged] == [(0.12, "missed"), (0.16, "met")]
    assert all(target.text.startswith("on cuda") for target in judged)


def test_on_a_cpu_overhead_has_two_ratios_and_on_a_gpu_one() -> None:
    one, ratio, whole = (stats.summarize([value]) for value in (50e-6, 0.14, 0.0987))
    for with_operation, shown in ((whole, ("0.140x", "0.099x")), (None, ("0.140x",))):
        row = overhead.Row("agr_cuda AdamW", "kept", "cuda", one, ratio, with_operation)
        peer = overhead.Row("torch AdamW, foreach", "kept", "", one, ratio, None)
        console = Console(width=150, record=True, file=io.StringIO())
        console.print(overhead.table([row, peer], "a machine"))
        text = console.export_text()
        assert all(cell in text for cell in shown)
        assert ("with its operation" in text) == (with_operation is not None)


def test_new_gradients_are_new_tensors_and_kept_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []

    def build(parameters: building.Parameters) -> building.Step:
        return lambda: seen.append([parameter.grad for parameter in parameters if parameter.grad is not None])

    args = argparse.Namespace(device=torch.device("cpu"), dtype="float32", tensors=3, elements=4)
    for new in (False, True):
        seen.clear()
        overhead.Track(overhead.Entry("any", build), new, args).run(2)
        assert len(seen) == overhead.UNTIMED + 2
        for earlier, later in itertools.pairwise(seen):
            assert len(later) == 3
            assert all((a is b) != new for a, b in zip(earlier, later, strict=True))
            assert all(map(torch.equal, earlier, later))


# Gradients that come and go


@pytest.mark.parametrize(
    ("pattern", "absent"),
    [
        ("the same every time", [set(), set(), set(), set()]),
        ("one tensor every other time", [set(), {0}, set(), {0}]),
        ("another tenth each time", [{0, 10}, {9}, {8}, {7}]),
        ("half and half", [{6, 7, 8, 9, 10}, {0, 1, 2, 3, 4, 5}] * 2),
    ],
)
def test_every_optimizer_meets_the_patterns_kept_gradients_at_every_step(
    pattern: str, absent: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[torch.Tensor | None]]] = {}

    def builder(label: str) -> building.Builder:
        def build(parameters: building.Parameters, eps: float) -> building.Step:
            return lambda: seen.setdefault(label, []).append([parameter.grad for parameter in parameters])

        return build

    monkeypatch.setattr(gradients, "OURS", {"ours": builder("ours")})
    monkeypatch.setattr(gradients, "PEERS", {gradients.UNIT: builder(gradients.UNIT)})
    args = argparse.Namespace(device=torch.device("cpu"), dtype="float32", tensors=11, elements=2, steps=4, seconds=60)
    rows = gradients.measure_pattern(pattern, args)
    assert [(row.label, row.ours, row.host_s.count) for row in rows] == [("ours", True, 4), (gradients.UNIT, False, 4)]
    for steps in seen.values():
        assert len(steps) == gradients.UNTIMED + 4
        assert [{i for i, grad in enumerate(step) if grad is None} for step in steps[-4:]] == absent
        for grads in zip(*steps, strict=True):
            assert len({id(grad) for grad in grads if grad is not None}) == 1, "it is kept"


@pytest.mark.parametrize("pattern", gradients.PATTERNS)
def test_the_steps_that_are_not_timed_are_whole_periods(pattern: str) -> None:
    has_gradient = gradients.PATTERNS[pattern]
    for i, k in itertools.product(range(25), range(12)):
        assert has_gradient(i, k, 25) == has_gradient(i, k + gradients.UNTIMED, 25)


@pytest.mark.usefixtures("threads")
def test_gradients_measures_every_pattern_and_judges_ours(tmp_path: Path) -> None:
    sizes = ["--tensors", "12", "--elements", "2", "--steps", "2"]
    assert main(["gradients", "--device", "cpu", *sizes, "--out", str(tmp_path), "--tag", "tiny"]) == 0
    path = tmp_path / "gradients-cpu-tiny.json"
    document = json.loads(path.read_text())
    labels = ["agr_cuda AdamW", "agr_cuda Adan", "torch AdamW, fused", "torch AdamW, default"]
    assert [(row["pattern"], row["label"]) for row in document["rows"]] == [
        (pattern, label) for pattern in gradients.PATTERNS for label in labels
    ]
    assert all(row["host_s"]["count"] == row["ratio"]["count"] == 2 for row in document["rows"])
    assert document["targets"] == [], "they are stated for 321 tensors of 64"
    assert len(path.read_text().splitlines()) < 100

    rows = [gradients.Row(**{**row, "host_s": None, "ratio": stats.summarize([1.1])}) for row in document["rows"]]
    judged = gradients.judge(rows)
    assert len(judged) == 2 * len(gradients.PATTERNS)
    assert {(target.limit, target.verdict) for target in judged} == {(1.0, "missed")}
    assert all(target.text.startswith("agr_cuda") for target in judged)
