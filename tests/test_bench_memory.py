"""`python -m bench memory`: bytes are counted exactly, and ours are those of the arithmetic."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import refusal

from bench.__main__ import main
from bench.commands import memory as command
from bench.commands.memory import Held, Row
from bench.measuring import memory
from bench.measuring.memory import Phase
from bench.workloads import building, contenders
from bench.workloads.contenders import BY_NAME
from bench.workloads.shapes import model_set

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LIKE = ("agr-adamw", "agr-adan", "agr-adamw-float32-8bit", "agr-adan-bfloat16-master", "agr-gradients")


# Counting


def event(name: str, time: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "ts": time, **more}


def change(time: float, count: int, index: int = 0, device: int = 0) -> dict[str, Any]:
    return event("[memory]", time, args={"Bytes": count, "Ev Idx": index, "Device Type": device})


def test_phases_are_read_from_a_trace_in_order() -> None:
    events = [
        change(7.0, -20, 3),
        event(memory.PHASE, 5.0, dur=4.0),
        event("aten::add", 1.0, dur=0.5),
        change(1.5, 100, 0),
        event(memory.PHASE, 1.0, dur=2.0),
        change(7.0, 50, 2),  # at the same time as the first, and before it
        change(4.0, -30, 1),  # between the two
        change(8.0, 1000, 4, device=1),  # of a GPU
        change(9.5, 7, 5),  # after both
    ]
    assert memory.phases(events) == [Phase(0, 100, 100), Phase(70, 120, 100)]


def test_what_is_kept_and_what_is_given_back_are_counted_to_the_byte() -> None:
    kept: list[torch.Tensor] = []

    def keep() -> None:
        kept.append(torch.ones(1000))

    def compute() -> None:
        kept[0].add_(torch.ones(500).sum() + torch.ones(300).sum())

    def replace() -> None:
        kept[0] = torch.ones(10)

    first, second, third = memory.cpu_meter([keep, compute, replace])
    assert first == (0, 4000, 4000)
    assert (second.before, second.after) == (4000, 4000)
    assert 6000 <= second.peak < 6100, "and scalars"
    assert third == (4000, 4040, 40)


def test_cycles_that_the_collector_frees_are_not_held_afterwards() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.tensor, self.itself = torch.ones(1000), self

    first, second = memory.cpu_meter([lambda: Cycle() and None, lambda: None])
    assert (first.before, first.peak) == (0, 4000)
    assert second == (0, 0, 0)


PROGRAM = """
import gc, json, sys, torch
from pathlib import Path
from bench.commands.memory import Training, measure
from bench.workloads.contenders import BY_NAME
from bench.workloads.shapes import model_set

def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

model, device, found = model_set("2x2000000"), torch.device("cpu"), {}
for name in sys.argv[1:]:
    training = Training(BY_NAME[name], model, device, torch.float32)
    *first, last = training.actions
    for action in first:
        action()
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    last()
    found[name] = [held("VmHWM") - before, measure(BY_NAME[name], model, device, torch.float32).held.step]
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system's count of resident memory is Linux's")
def test_a_steps_bytes_are_those_that_the_process_grows_by() -> None:
    """Nothing is allocated where PyTorch does not count. Large blocks come from the system and go back at once."""
    names = ("agr-adamw", "agr-adan-float32-8bit", "torch-adamw-foreach")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (resident, counted) in found.items():
        assert abs(resident - counted) < 1e6, name  # a page here and there; a tensor has 8e6
    assert found["agr-adamw"][1] < 1000
    assert found["torch-adamw-foreach"][1] >= 16e6


# What is held


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", LIKE)
def test_ours_hold_what_the_arithmetic_says_and_a_step_nothing(name: str) -> None:
    torch.set_num_threads(1)
    entry, model = BY_NAME[name], model_set("3x8192")
    held = command.measure(entry, model, CPU, torch.float32).held
    assert held
    itemsize = entry.stored(torch.float32).parameter.itemsize
    assert held.parameters == held.gradients == itemsize * model.elements
    assert 0 <= held.state - held.rule <= 64 * len(model.shapes), "step counts"
    assert held.step <= 64
    assert held.peak == held.parameters + held.gradients + held.state + held.step


@pytest.mark.usefixtures("threads")
def test_what_a_step_allocates_is_its_peak_and_not_its_sum() -> None:
    torch.set_num_threads(1)
    model = model_set("3x8192")
    # Three lines make two tensors of one gradient's size, a third of the model's, at a time.
    for name, count in (("torch-adamw-foreach", 4), ("three-lines", 8 / 3), ("reference-adamw", 16)):
        held = command.measure(BY_NAME[name], model, CPU, torch.float32).held
        assert held
        assert held.step / model.elements == pytest.approx(count, abs=0.02), name
    masters = command.measure(BY_NAME["torch-adamw-fused-master"], model, CPU, torch.float32).held
    assert masters
    assert masters.state / model.elements == pytest.approx(16, abs=0.01), "float32 gradients besides masters"
    assert masters.rule / model.elements == 12


# Judged


def row(name: str, state: float, step: float, model: str = "gpt2") -> Row:
    elements = model_set(model).elements
    counts = [int(elements * count) for count in (4, 4, state, step, 0)]
    held = Held(*counts, rule=8.0 * elements)
    return Row(model, elements, name, name, BY_NAME[name].ours, "measured", "", held)


def test_ours_are_judged_by_the_arithmetic_on_large_models() -> None:
    gpt2 = model_set("gpt2")
    good, large, greedy = row("agr-adamw", 8.01, 0.0), row("agr-adan", 8.2, 0.0), row("agr-adamw-off", 8.0, 4.0)
    others = [row("torch-adamw-foreach", 16.0, 4.0), row("reference-adamw", 16.0, 16.0)]
    for rows, verdicts in (([good], ["met", "met"]), ([good, large], ["missed", "met"]), ([greedy], ["met", "missed"])):
        assert [target.verdict for target in command.judge([*rows, *others], gpt2)] == verdicts
    assert [target.verdict for target in command.judge(others, gpt2)] == ["not measured"] * 2
    assert command.judge([row("agr-adamw", 9.0, 4.0, "321x64")], model_set("321x64")) == []


# The command line


def arguments(folder: Path, *more: str) -> list[str]:
    return ["memory", "--device", "cpu", "--threads", "1", "--out", str(folder), "--tag", "tiny", *more]


@pytest.mark.usefixtures("threads")
def test_memory_writes_a_row_a_contender_and_names_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optimi", None)
    names = ["agr-adamw", "torch-adamw-fused", "optimi-adan", "agr-adan-triton"]
    assert main(arguments(tmp_path, "--sets", "2x5000", "3x7", "--contenders", *names)) == 0
    document = json.loads((tmp_path / "memory-cpu-tiny.json").read_text())
    assert document["left_out"] == {"for a GPU alone": ["agr-adan-triton"]}
    assert document["machine"]["versions"].keys() >= {"deepspeed", "bitsandbytes", "torchao", "timm"}
    measured = [(entry["set"], entry["name"]) for entry in document["rows"]]
    assert measured == [(of, name) for of in ("2x5000", "3x7") for name in names[:3]]
    first, _, missing, *_ = document["rows"]
    assert first["held"]["parameters"] == first["held"]["gradients"] == 40_000
    assert first["held"]["state"] == 80_008
    assert (missing["status"], missing["held"]) == ("not installed", None)
    shown = capsys.readouterr().out
    assert "optimi Adan, default: not installed: pip install torch-optimi" in shown
    assert "Not measured, for a GPU alone: agr-adan-triton." in shown


@pytest.mark.usefixtures("threads")
def test_a_failing_contender_costs_nobody_else_their_figures_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(parameters: building.Parameters, eps: float) -> building.Step:
        raise RuntimeError("out of order")

    broken = dataclasses.replace(BY_NAME["torch-adamw-foreach"], build=fail)
    monkeypatch.setattr(contenders, "ALL", (broken, BY_NAME["agr-adamw"]))
    assert main(arguments(tmp_path, "--sets", "2x10", "--contenders", broken.name, "agr-adamw")) == 1
    first, second = json.loads((tmp_path / "memory-cpu-tiny.json").read_text())["rows"]
    assert (first["status"], first["reason"]) == ("failed", "RuntimeError: out of order")
    assert second["status"] == "measured"


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--sets", "gpt5", "gpt2, resnet50, vit-b-16"),
        ("--contenders", "lion", "deepspeed-adamw"),
        ("--device", "tpu", "cpu, cuda and cuda:INDEX"),
        ("--tag", "../x", "letters, digits"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(arguments(tmp_path, f"{option}={value}"), capsys)
    assert all(part in message for part in (option, repr(value), allowed))
