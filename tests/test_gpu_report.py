"""The GPU report: its runner, its readers and its files, on commands and outputs that need no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import agr_cuda
from bench.__main__ import build_parser
from bench.gpu_report import counters, digests, exercise, runner, stages, tactics, tune, variants
from bench.gpu_report.__main__ import main
from bench.gpu_report.place import Place
from bench.gpu_report.report import make
from bench.gpu_report.runner import Command, Digest, Outcome, Run, Skip, Stage
from bench.gpu_report.summary import render
from bench.gpu_report.variants import Case, Environment, Result
from bench.measuring.clocks import Timing
from bench.measuring.stats import Interval, Summary

ROOT = Path(__file__).resolve().parent.parent


def script(text: str, limit: float | None = None) -> Command:
    """A command that runs a few lines of Python, and starts quickly."""
    return Command((sys.executable, "-S", "-u", "-c", text), limit=limit)


def stage(name: str, *commands: Command, seconds: float = 10.0, digest: object = None) -> Stage:
    read = digest if callable(digest) else lambda runs: Digest()
    return Stage(name, seconds, lambda: commands, read)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


# The runner


def test_a_stage_that_succeeds_has_its_lines_and_leaves_its_output_in_the_log(log: Path) -> None:
    def digest(runs: Sequence[Run]) -> Digest:
        return Digest([run.output.strip() for run in runs], {"count": len(runs)})

    commands = script("print('one')"), script("import os; print(os.environ['WORD'])")
    commands = commands[0], Command(commands[1].words, {"WORD": "two"})
    outcome = runner.run_stage(stage("good", *commands, digest=digest), 10, log)
    assert (outcome.name, outcome.status, outcome.reason) == ("good", "ok", "")
    assert outcome.lines == ["one", "two"]
    assert outcome.figures == {"count": 2}
    assert "good\n" in log.read_text()
    assert "\none\n" in log.read_text()


def test_a_failing_command_fails_its_stage_and_the_others_still_run(log: Path) -> None:
    fails = script("import sys; print('out'); print('why', file=sys.stderr); sys.exit(3)")
    outcome = runner.run_stage(stage("bad", fails, script("print('after')")), 10, log)
    assert outcome.status == "failed"
    assert outcome.reason == f"{Path(sys.executable).name} ended with exit code 3"
    assert outcome.tail == ["out", "why"]
    assert "after" in log.read_text()


def test_a_problem_names_the_command_and_not_the_output_that_it_owes(log: Path) -> None:
    def owes(runs: Sequence[Run]) -> Digest:
        raise FileNotFoundError("figures.json")

    command = Command((sys.executable, "-m", "json.tool", "no-such-file"))
    outcome = runner.run_stage(stage("owing", command, digest=owes), 10, log)
    assert outcome.reason == f"{Path(sys.executable).name} -m json.tool no-such-file ended with exit code 2"


def test_a_command_at_its_limit_is_interrupted_and_can_write_what_it_has(log: Path) -> None:
    text = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("half of it")
"""
    begin = time.monotonic()
    outcome = runner.run_stage(stage("slow", script(text)), 0.8, log)
    assert time.monotonic() - begin < 5
    assert outcome.status == "failed"
    assert "was stopped after" in outcome.reason
    assert outcome.tail == ["half of it"]


def test_what_ignores_the_interrupt_is_killed_with_all_it_started(log: Path, tmp_path: Path) -> None:
    text = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    run = runner.run_command(script(text), 1.0, log)
    assert run.code is None
    assert 0.9 < run.seconds < 5
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 5
    while running(child):
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.02)


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_is_not_there_fails_its_stage(log: Path) -> None:
    outcome = runner.run_stage(stage("none", Command(("no-such-program",))), 10, log)
    assert (outcome.status, outcome.reason) == ("failed", "no-such-program ended with exit code 127")
    assert "No such file" in outcome.tail[0]


def test_a_stage_may_be_skipped_and_a_strange_output_fails_its_own_stage_alone(log: Path) -> None:
    def skip() -> list[Command]:
        raise Skip("ncu is not on PATH")

    def strange(runs: Sequence[Run]) -> Digest:
        raise KeyError("sets")

    outcomes: list[Outcome] = []
    stages = [
        Stage("skipped", 1, skip, lambda runs: Digest()),
        stage("strange", script(""), digest=strange),
        stage("wrong", script(""), digest=lambda runs: Digest(problem="nothing was measured")),
        stage("last", script("")),
    ]
    assert runner.run_stages(stages, log, outcomes.append) == outcomes
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [
        ("skipped", "ncu is not on PATH"),
        ("failed", "its output could not be read: KeyError: 'sets'"),
        ("failed", "nothing was measured"),
        ("ok", ""),
    ]


def test_time_that_a_stage_leaves_goes_to_the_next_and_none_is_borrowed(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    clock = [100.0]

    def run_stage(stage: Stage, limit: float, log: Path) -> Outcome:
        limits.append(limit)
        clock[0] += {"quick": 2.0, "long": 13.0, "last": 1.0}[stage.name]
        return Outcome(stage.name, "ok", 0.0)

    monkeypatch.setattr(runner, "run_stage", run_stage)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    stages = [stage(name, seconds=seconds) for name, seconds in (("quick", 10), ("long", 5), ("last", 3))]
    runner.run_stages(stages, log, lambda outcome: None)
    assert limits == [10.0, 13.0, 3.0]


def test_without_time_left_a_command_is_not_begun(log: Path) -> None:
    outcome = runner.run_stage(stage("late", script("print('begun')")), 0.0, log)
    assert outcome.status == "failed"
    assert "no time was left" in outcome.reason
    assert "begun" not in log.read_text()


# The stages


def place(work: Path) -> Place:
    return Place(ROOT, work, (9, 0))


def all_commands(work: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Sequence[Command]]:
    """The commands of all stages, as on a machine that has every tool."""
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/tools/{name}")
    monkeypatch.setattr(stages, "find_spec", lambda name: name)
    return {name: make(place(work)).commands() for name, make in stages.STAGES.items()}


def test_all_stages_together_take_less_than_nine_minutes(tmp_path: Path) -> None:
    seconds = {name: make(place(tmp_path)).seconds for name, make in stages.STAGES.items()}
    assert sum(seconds[name] for name in stages.BY_DEFAULT) <= 535
    assert seconds.keys() - stages.BY_DEFAULT == stages.APART
    assert seconds["train"] < 360
    assert sum(seconds[name] for name in stages.APART) <= 420


def test_the_stages_ask_benchmarks_for_what_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    commands = all_commands(tmp_path, monkeypatch)
    parsed: list[argparse.Namespace] = []
    for command in (command for entries in commands.values() for command in entries):
        words = list(command.words)
        if "bench" in words:
            parsed.append(build_parser().parse_args(words[words.index("bench") + 1 :]))
        for program in (tactics, tune, exercise):
            if program.__name__ in words:
                parsed.append(program.build_parser().parse_args(words[words.index(program.__name__) + 1 :]))
    assert len(parsed) == 2 + 2 + 1 + 1 + 1 + 1 + 2 + 2 + 2 + 1 + 1 + 1
    steps = [args for args in parsed if getattr(args, "command", "") == "step"]
    formats = {contender.format for args in steps for contender in args.contenders if contender.ours}
    assert len(formats) == 6, "five, and what is all of --dtype"
    modules = {contender.module for args in steps for contender in args.contenders if contender.format}
    assert modules == {"agr_cuda", "torch", "torchao", "bitsandbytes", "optimi"}
    step = next(args for args in parsed if getattr(args, "command", "") == "step")
    assert [model.name for model in step.sets] == list(stages.SETS)
    names = {contender.name for contender in step.contenders}
    assert {"three-lines-compiled", "agr-adamw-triton", "agr-adan-triton", "optimi-adan-triton"} < names


def test_the_training_s_digest_tells_changes_of_pairs() -> None:
    def run_with(arm: str, seed: int, loss: float | None, judged: bool = True) -> dict[str, Any]:
        return {"task": "gpt", "arm": arm, "seed": seed, "judged": judged, "held_out": [9.0, loss]}

    runs = [run_with("adamw", 1, 2.0), run_with("adamw", 2, 1.0), run_with("adamw", 0, 0.1, judged=False)]
    runs += [run_with("agr-adamw", 1, 2.2), run_with("agr-adamw", 2, 1.2), run_with("agr-adamw", 3, None)]
    lines = "\n".join(digests.training_table({"runs": runs, "complete": False}))
    assert "6 runs, stopped at its time" in lines
    assert re.search(r"\| gpt \| agr-adamw \| 2 \| 1.7000 \| \+15.000% ± 7.071% \|", lines), lines
    assert re.search(r"\| gpt \| adamw \| 2 \| 1.5000 \| +\|", lines), lines


def test_the_build_is_for_this_gpu_and_nothing_sets_its_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = all_commands(tmp_path, monkeypatch)
    assert commands["build"][0].environment["AGR_CUDA_ARCHS"] == "90"
    for command in (command for entries in commands.values() for command in entries):
        words = list(command.words)
        if words[0].endswith("/ncu") and "--import" not in words:
            assert words[words.index("--clock-control") + 1] == "none"
        if words[0].endswith("nvidia-smi"):
            assert all(word.startswith(("--query-gpu=", "--format=")) for word in words[1:])


def test_stages_are_skipped_where_their_tool_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    for name, program in (("sanitizer", "compute-sanitizer"), ("profile", "ncu")):
        with pytest.raises(Skip, match=f"{program} is not on PATH"):
            stages.STAGES[name](place(tmp_path)).commands()


def left_by_the_build(folder: Path, **reasons: str | None) -> None:
    """Why backends are not there. The core is built for a GPU unless there is no nvcc."""
    built_for = "" if "nvcc" in str(reasons["cuda"]) else "90"
    (folder / "backends.json").write_text(json.dumps({"reasons": reasons, "built_for": built_for}))


def test_the_build_tells_which_backends_there_are(tmp_path: Path) -> None:
    """Without nvcc, the one that is left will do; a cuda backend that was built and does not run will not."""
    digest = stages.build(place(tmp_path)).digest
    runs = [run_of(["pip"], "0 bytes spill stores\n8 bytes spill loads\n")]
    left_by_the_build(tmp_path, cuda=None, triton=None)
    assert digest(runs) == Digest(
        ["installed in 1 s", "8 bytes spill loads"],
        {"install_s": 1.0, "spills": ["8 bytes spill loads"], "missing": {}},
    )
    left_by_the_build(tmp_path, cuda="no nvcc", triton=None)
    found = digest(runs)
    assert not found.problem
    assert found.lines[-1] == "no cuda backend: no nvcc"
    left_by_the_build(tmp_path, cuda="cuda:0 has compute capability 9.0", triton=None)
    assert digest(runs).problem == "the cuda backend is not there"
    left_by_the_build(tmp_path, cuda="no nvcc", triton="no Triton")
    assert digest(runs).problem == "the cuda backend is not there; the triton backend is not there"


def test_without_a_cuda_backend_the_report_is_about_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_the_build(tmp_path, cuda="no nvcc", triton=None)
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/tools/{name}")
    for name in ("sanitizer", "profile", "tactics", "tune"):
        with pytest.raises(Skip, match="no cuda backend: no nvcc"):
            stages.STAGES[name](place(tmp_path)).commands()
    for name in ("step", "precision", "overhead", "gradients", "traffic"):
        assert stages.STAGES[name](place(tmp_path)).commands()
    words = stages.precision(place(tmp_path)).commands()[0].words
    assert all(word.endswith("-triton") for word in words if word.startswith("agr-"))


@pytest.mark.parametrize(
    ("reasons", "names"),
    [
        (None, "cuda or triton"),
        ({"cuda": None, "triton": None}, "cuda or triton"),
        ({"cuda": "no nvcc", "triton": None}, "triton"),
        ({"cuda": None, "triton": "no Triton"}, "cuda"),
    ],
)
def test_the_tests_of_the_backends_that_are_there_are_run(
    reasons: dict[str, str | None] | None, names: str, tmp_path: Path
) -> None:
    if reasons is not None:
        left_by_the_build(tmp_path, **reasons)
    (command,) = stages.tests(place(tmp_path)).commands()
    wanted = command.words[list(command.words).index("-k") + 1]
    assert wanted.startswith(f"({names} or test_gpu) and not (")


def test_what_the_build_asks_python_works_here(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core is there, so that it is not installed again, and says which backends there are."""
    _, without_cuda, _, which_backends = all_commands(tmp_path, monkeypatch)["build"]
    assert without_cuda.environment["AGR_CUDA_ARCHS"] == "none"
    assert list(without_cuda.words[3:6]) == [sys.executable, "-m", "pip"]
    touched = tmp_path / "installed"
    install = Command((*without_cuda.words[:3], sys.executable, "-c", f"open({str(touched)!r}, 'w')"))
    for command in (install, which_backends):
        run = runner.run_command(command, 60, log)
        assert run.code == 0, run.output
    assert not touched.exists()
    found = json.loads(place(tmp_path).backends.read_text())
    assert found["reasons"].keys() == {"cuda", "triton", "cpu", "reference"}
    assert place(tmp_path).why_missing("cpu") is None


def test_without_a_core_the_package_is_installed_without_cuda(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where Python looks first
    package = tmp_path / "agr_cuda"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "native.py").write_text("def why_missing():\n    return 'it was not compiled'\n")
    touched = tmp_path / "installed"
    install = (sys.executable, "-S", "-c", f"open({str(touched)!r}, 'w')")
    command = Command((sys.executable, "-S", "-c", stages.WITHOUT_CUDA, *install))
    run = runner.run_command(command, 60, log)
    assert run.code == 0, run.output
    assert touched.exists()


def run_of(words: Sequence[str], output: str, code: int = 0) -> Run:
    return Run(Command(words), code, 1.0, output)


def test_the_machine_is_read_from_its_tools(tmp_path: Path) -> None:
    smi = "NVIDIA H200, 580.1, 143771 MiB, 3 MiB, 345 MHz, 3201 MHz, 75.1 W, 700.00 W, 30\n"
    nvcc = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n"
    versions = json.dumps({"python": "3.12.3", "torch": "2.11.0", "triton": None})
    runs = [run_of(["/x/nvidia-smi"], smi), run_of(["nvcc"], nvcc), run_of(["python3"], f"a warning\n{versions}\n")]
    digest = stages.machine(place(tmp_path)).digest(runs)
    assert digest.lines == ["driver 580.1, python 3.12.3, torch 2.11.0, triton None, nvcc 13.0"]
    assert digest.figures["nvidia_smi"]["clocks.mem"] == "3201 MHz"
    assert "driver not told" in stages.machine(place(tmp_path)).digest(runs[2:]).lines[0]


def test_the_sanitizers_summaries_are_read(tmp_path: Path) -> None:
    clean = "ok   AGR-AdamW: off by 0\n========= ERROR SUMMARY: 0 errors\n"
    racy = "WRONG AGR-Adan: off by 1\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    read = stages.sanitizer(place(tmp_path)).digest
    digest = read([run_of(["compute-sanitizer"], clean), run_of(["compute-sanitizer"], racy, 9)])
    assert digest.lines == [
        "memcheck: ERROR SUMMARY: 0 errors",
        "racecheck: RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
        "WRONG AGR-Adan: off by 1",
    ]
    assert not digest.problem
    assert read([run_of([""], clean), run_of([""], "Device not supported")]).problem


# What stages leave


def test_pytests_report_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.test_a" name="test_good[cuda]"/>
        <testcase classname="tests.test_a" name="test_bad[cuda]"><failure message="no">...</failure></testcase>
        <testcase classname="tests.test_a" name="test_broken[cuda]"><error message="no">...</error></testcase>
        <testcase classname="tests.test_a" name="test_left_out[cuda]"><skipped/></testcase>
        </testsuite></testsuites>"""
    )
    digest = digests.junit(path)
    assert digest.lines == [
        "1 passed, 2 failed, 1 skipped",
        "tests.test_a::test_bad[cuda]",
        "tests.test_a::test_broken[cuda]",
    ]
    assert digest.figures["passed"] == 1
    path.write_text('<testsuites><testsuite><testcase name="a"><skipped/></testcase></testsuite></testsuites>')
    assert digests.junit(path).problem == "no test ran"


def test_of_tests_that_were_stopped_the_output_is_read(tmp_path: Path) -> None:
    output = """
tests/test_a.py::test_one[cuda] PASSED        [  1%]
[gw1] [  2%] PASSED tests/test_a.py::test_two[cuda]
[gw0] [  2%] FAILED tests/test_a.py::test_three[cuda]
scheduling tests, none of which FAILED
"""
    digest = stages.tests(place(tmp_path)).digest([run_of(["pytest"], output)])
    assert digest.lines == ["so far 2 passed, 1 failed, 0 error, 0 skipped"]
    assert digest.problem == "pytest wrote no report"


def step_document(dtype: str) -> dict[str, object]:
    def row(name: str, seconds: float | None) -> dict[str, object]:
        figures = seconds and {
            "step_s": {"median": seconds},
            "host_s": {"median": seconds / 10},
            "ratio": {"median": seconds / 1e-3},
            "share_of_copy": 0.912,
            "kernels": None,
        }
        status, reason = ("measured", "") if seconds else ("failed", "RuntimeError: out of order")
        return {"name": name, "status": status, "reason": reason, "figures": figures or None}

    sets = [
        {"name": name, "copy": {"median": 4.3e12}, "rows": [row("torch-adamw-fused", 1e-3), row("agr-adamw", seconds)]}
        for name, seconds in (("gpt2", 0.98e-3), ("resnet50", None))
    ]
    return {"settings": {"dtype": dtype}, "sets": sets, "targets": []}


def test_a_step_benchmark_becomes_a_table_with_the_reasons_below(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        (tmp_path / f"step-cuda-{dtype}-gpu-report.json").write_text(json.dumps(step_document(dtype)))
    digest = stages.step(place(tmp_path)).digest([])
    assert digest.lines[:6] == [
        "| float32 | gpt2 (4.30 TB/s) | resnet50 (4.30 TB/s) |",
        "| --- | --- | --- |",
        "| torch-adamw-fused | 1000 us 1.00x 91% | 1000 us 1.00x 91% |",
        "| agr-adamw | 980 us 0.98x 91% | failed |",
        "",
        "agr-adamw, failed: RuntimeError: out of order (resnet50)",
    ]
    assert digest.lines[6].startswith("| bfloat16 |")
    rows = digest.figures["sets"]["step-cuda-float32-gpu-report"]["gpt2"]["rows"]
    assert rows["agr-adamw"]["step_s"] == 0.98e-3


def test_formats_become_a_table_with_the_bytes_that_they_move(tmp_path: Path) -> None:
    def row(name: str, bytes_per_element: float) -> dict[str, object]:
        (measured, *_) = step_document("float32")["sets"][0]["rows"]
        figures = {**measured["figures"], "bytes_per_element": bytes_per_element, "ratio_per_byte": 1.024}
        return {**measured, "name": name, "figures": figures}

    absent = {"name": "torchao-adamw8bit", "status": "not installed", "reason": "pip install it", "figures": None}
    yardstick = row("torch-adamw-fused", 28)
    for tag, rows in (("", [yardstick, row("agr-adamw-8bit", 16.0625)]), ("-compiling", [yardstick, absent])):
        document = {"settings": {}, "sets": [{"name": "gpt2", "copy": {"median": 4e12}, "rows": rows}]}
        (tmp_path / f"step-cuda-precision-gpu-report{tag}.json").write_text(json.dumps(document))
    digest = stages.precision(place(tmp_path)).digest([])
    assert digest.lines == [
        "| format | step | bytes an element | ratio | a byte | of copy |",
        "| --- | --- | --- | --- | --- | --- |",
        "| torch-adamw-fused | 1000 us | 28 | 1.00x | 1.02x | 91% |",
        "| agr-adamw-8bit | 1000 us | 16.06 | 1.00x | 1.02x | 91% |",
        "",
        "torchao-adamw8bit, not installed: pip install it",
    ]
    assert "gpt2" in digest.figures["sets"]["step-cuda-precision-gpu-report"]
    assert not stages.step(place(tmp_path)).digest([]).figures["sets"]


def test_memory_becomes_a_table_of_bytes_an_element(tmp_path: Path) -> None:
    held = {"parameters": 400, "gradients": 400, "state": 800, "step": 0, "peak": 1600, "rule": 800.0}
    rows = [
        {"name": "agr-adamw", "elements": 100, "status": "measured", "reason": "", "held": held},
        {"name": "optimi-adan", "elements": 100, "status": "not installed", "reason": "pip install it", "held": None},
    ]
    (tmp_path / "memory-cuda-gpu-report.json").write_text(json.dumps({"rows": rows, "targets": []}))
    digest = stages.memory(place(tmp_path)).digest([])
    assert digest.lines == [
        "| bytes an element | state | by arithmetic | a step | peak |",
        "| --- | --- | --- | --- | --- |",
        "| agr-adamw | 8.000 | 8.000 | 0.000 | 16.000 |",
        "",
        "optimi-adan, not installed: pip install it",
    ]
    assert digest.figures["rows"] == rows


def test_a_sweep_becomes_a_table_of_shares_of_the_copy(tmp_path: Path) -> None:
    document = step_document("float32")
    for entry in document["sets"]:
        entry.update(tensors=4, elements=400)
    (tmp_path / "sweep-cuda-gpu-report.json").write_text(json.dumps(document))
    digest = stages.sweep(place(tmp_path)).digest([])
    assert digest.lines == [
        "| of copy | torch-adamw-fused | agr-adamw |",
        "| --- | --- | --- |",
        "| 4 x 100 | 91% | 91% |",
        "| 4 x 100 | 91% | - |",
    ]
    assert digest.figures["sets"].keys() == {"gpt2", "resnet50"}


def test_a_contender_that_was_not_measured_is_left_out_of_the_table_and_says_why_once() -> None:
    document = step_document("float32")
    absent = {"name": "optimi-adamw-triton", "status": "not installed", "reason": "pip install it", "figures": None}
    for entry in document["sets"]:
        entry["rows"].append(absent)
    lines = digests.step_table(document)
    assert [line for line in lines if "optimi" in line] == ["optimi-adamw-triton, not installed: pip install it"]


def test_gradients_that_come_and_go_have_a_line_a_pattern(tmp_path: Path) -> None:
    def row(pattern: str, label: str, seconds: float) -> dict[str, object]:
        return {
            "pattern": pattern,
            "label": label,
            "host_s": {"median": seconds},
            "ratio": {"median": seconds / 1e-3},
        }

    rows = [row(pattern, label, t) for pattern in ("all", "half") for label, t in (("ours", 5e-5), ("torch", 1e-3))]
    target = {"text": "ours", "verdict": "met"}
    (tmp_path / "gradients-cuda-gpu-report.json").write_text(json.dumps({"rows": rows, "targets": [target]}))
    digest = stages.gradients(place(tmp_path)).digest([])
    assert digest.lines == [
        "- all: ours 50.0 us (0.050x), torch 1000.0 us (1.000x)",
        "- half: ours 50.0 us (0.050x), torch 1000.0 us (1.000x)",
    ]
    assert digest.figures["targets"] == [target]


def test_a_long_reason_is_one_line_with_its_beginning_and_its_end() -> None:
    assert digests.shortened("no\n  good") == "no good"
    shown = digests.shortened("at 12:4:\n" + "    code\n" * 1000 + "CompilationError: no such type")
    assert shown.startswith("at 12:4: code")
    assert shown.endswith("CompilationError: no such type")
    assert "\n" not in shown
    assert len(shown) < 320


NCU_HEADINGS = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size"'
NCU_RAW = f"""==PROF== Connected to process 4242 (/opt/python3.12)
==PROF== Profiling "agr_step" - 0: 0%....50%....100% - 4 passes
{NCU_HEADINGS},"Device","CC","{counters.READ}","{counters.WRITTEN}","{counters.DURATION}","{counters.HITS}"
"","","","","","","","","","","","byte","Mbyte","ns","%"
"0","4242","python3","h","void agr_step<A, B>(C)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0","2,000,000,000",\
"1,500.25","812,345","51.25"
"1","4242","python3","h","void agr_step<D, B>(C)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0","3000","12.5",\
"900","n/a"
==PROF== Disconnected from process 4242
"""
NCU_DETAILS = f"""{NCU_HEADINGS},"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python","h","agr_step","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0","metrics","{counters.READ}","Gbyte","2.00"
"0","1","python","h","agr_step","1","7","(1, 1, 1)","(1, 1, 1)","0","9","metrics","{counters.DURATION}","us","812.5"
"""


def test_both_of_ncus_tables_are_read_in_base_units() -> None:
    first, second = counters.kernels(NCU_RAW.splitlines())
    expected = {counters.READ: 2e9, counters.WRITTEN: 1500.25e6, counters.DURATION: 812345e-9}
    assert first == pytest.approx(expected | {counters.HITS: 51.25})
    assert counters.HITS not in second, "what was not counted is left out"
    (details,) = counters.kernels(NCU_DETAILS.splitlines())
    assert details == pytest.approx({counters.READ: 2e9, counters.DURATION: 812.5e-6})
    assert counters.kernels(["==ERROR== No kernels were profiled."]) == []


def traffic_file(folder: Path, dtype: str = "float32") -> None:
    def entry(rule: str, share: float, total: float, on_chip: int = 0) -> dict[str, object]:
        return {"set": "gpt2", "rule": rule, "share": share, "on_chip_bytes": on_chip, "total": total}

    entries = [
        entry("AdamW", 1.0, 28.9),
        entry("AdamW", 0.5, 29.1),
        entry("AdamW", 0.5, 28.5, 99),
        entry("Adan", 1.0, 45),
    ]
    document = {"settings": {"dtype": dtype}, "predictions": entries}
    (folder / f"traffic-{dtype}-gpu-report.json").write_text(json.dumps(document))


def test_measured_bytes_stand_beside_predicted_ones(tmp_path: Path) -> None:
    cases = [
        {"rule": rule, "set": "gpt2", "dtype": "float32", "elements": 100_000_000, "bytes_per_element": 28}
        for rule in ("AGR-AdamW", "AdamW, agr off")
    ]
    traffic_file(tmp_path)
    traffic_file(tmp_path, "bfloat16")
    (tmp_path / "profile-cases.json").write_text(json.dumps(cases))
    (tmp_path / "profile.csv").write_text(NCU_RAW)
    digest = stages.profile(place(tmp_path)).digest([])
    first, second = digest.figures["steps"]
    assert first["measured"] == pytest.approx({"read": 20.0, "written": 15.0025, "total": 35.0025})
    assert first["predicted"] == {"1": 28.9, "0.5": 29.1}
    assert second["predicted"] == {}
    row = next(line for line in digest.lines if "AGR-AdamW" in line)
    assert "20.00 + 15.00 = 35.00 | 28.90 (1), 29.10 (0.5)" in row
    assert "812 us" in row


def test_more_kernels_than_steps_are_no_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ncu saw 2 kernels of 1 steps"):
        counters.compare([{}], counters.kernels(NCU_RAW.splitlines()), [])


# Variants of a launch


def results(variant: str, ratios: Sequence[float]) -> list[Result]:
    """A variant's results, with intervals of no width."""
    one = Summary(1.0, 1.0, 1.0, 1.0, 9)
    return [
        Result(f"case {place}", variant, one, Summary(ratio, ratio, ratio, ratio, 9), Interval(ratio, ratio), 0.9)
        for place, ratio in enumerate(ratios)
    ]


def test_a_variants_variables_are_there_while_its_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGR_CUDA_CHUNK", "1024")
    monkeypatch.delenv("AGR_CUDA_WINDOW", raising=False)
    environment = Environment(tune.variables({"window": 5}))
    environment.swap()
    assert os.environ["AGR_CUDA_WINDOW"] == "5"
    assert "AGR_CUDA_CHUNK" not in os.environ, "the default"
    environment.swap()
    assert os.environ["AGR_CUDA_CHUNK"] == "1024"
    assert "AGR_CUDA_WINDOW" not in os.environ


def test_every_variant_steps_with_its_variables_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """All with the case's options, from their first step on, which is when the cuda backend makes its launches."""
    monkeypatch.setenv("AGR_CUDA_WITHOUT", "what the caller asked for")
    seen: dict[torch.optim.Optimizer, list[str | None]] = {}
    step = variants.agr_cuda.Adan.step

    def watched(self: agr_cuda.Adan) -> None:
        assert self.param_groups[0]["params"][0].dtype == torch.bfloat16
        assert self.max_grad_norm == 1.0
        seen.setdefault(self, []).append(os.environ.get("AGR_CUDA_WITHOUT"))
        step(self)

    def clock(action: Callable[[], object]) -> Timing:
        action()
        return Timing(6.0, 6.0)

    monkeypatch.setattr(variants.agr_cuda.Adan, "step", watched)
    monkeypatch.setattr(variants.clocks, "clock_for", lambda device: clock)
    case = Case("small", "2x50", "Adan", torch.bfloat16, {"max_grad_norm": 1.0}, steps=3)
    tried = tactics.without(["a"], ["a", "b"])
    cpu = torch.device("cpu")
    found = variants.measure(case, tried, cpu, 60.0, variants.CopyProbe(cpu, 1), rounds=7)
    assert [set(values) for values in seen.values()] == [{None}, {None}, {"a"}, {"a,b"}]
    assert {len(values) for values in seen.values()} == {(2 + 7) * 3}, "two visits, and one a round"
    assert os.environ["AGR_CUDA_WITHOUT"] == "what the caller asked for"
    one, third, bandwidth = Summary(1.0, 1.0, 1.0, 1.0, 7), Summary(2.0, 2.0, 2.0, 2.0, 7), 2 * 2**20 / 6.0
    share = pytest.approx(11 * 2 * 100 / 2.0 / bandwidth)  # Adan's accesses, bfloat16's bytes
    assert found == [
        Result("small", name, third, one, Interval(1.0, 1.0), share) for name in ("none", "none (control)", "a", "a, b")
    ]


# The kernel's tactics


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(1.02, 1.03), (1.0, 1.0)], "keep"),
        ([(1.02, 1.03), (0.98, 1.02)], "keep"),
        ([(0.97, 0.98), (1.0, 1.0)], "drop"),
        ([(0.97, 0.98), (1.02, 1.03)], "mixed"),
        ([(0.991, 1.009), (1.002, 1.003)], "no difference"),
        ([(0.991, 1.02), (1.0, 1.0)], "unclear"),  # perhaps slower
        ([(0.98, 1.0), (1.0, 1.0)], "unclear"),  # perhaps faster
        ([(1.0, 1.0), None], "unclear"),
        ([(1.02, 1.03), None], "keep"),
        ([None], "unclear"),
    ],
)
def test_a_tactic_is_worth_its_code_if_a_step_is_slower_without_it(
    intervals: Sequence[tuple[float, float] | None], expected: str
) -> None:
    for order in (intervals, intervals[::-1]):
        assert tactics.verdict([pair and Interval(*pair) for pair in order]) == expected


def test_the_kernel_says_what_tactics_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    core = argparse.Namespace(cuda_tactics={"no_fences": 16, "early_inputs": 32})
    monkeypatch.setattr(tactics, "native", lambda: core)
    assert tactics.names() == ("no_fences", "early_inputs")


def test_the_cases_exercise_what_tactics_are_for() -> None:
    cases = tactics.CASES.values()
    shapes = {case.name: variants.model_set(case.set).shapes for case in cases}
    assert {case.rule for case in cases} == {"AdamW", "Adan"}
    assert any(case.dtype == torch.bfloat16 and case.options.get("max_grad_norm") for case in cases)
    assert any(len(tensors) > 300 for tensors in shapes.values()), "many small tensors"
    assert any(min(map(math.prod, tensors)) > 2**24 for tensors in shapes.values()), "many chunks in each tensor"


def test_what_is_judged_becomes_a_row_with_ratios_and_their_intervals() -> None:
    found = [*results("none", (1.0, 1.0)), *results("no_fences", (1.034, 0.998)), *results("own_counts", (1.0,))]
    first, second, third = tactics.judged(found, ["case 0", "case 1"])
    assert first == {"variant": "none", "cases": {"case 0": "1 s 90%", "case 1": "1 s 90%"}, "result": ""}
    assert second["cases"] == {"case 0": "1.034 (1.034-1.034)", "case 1": "0.998 (0.998-0.998)"}
    assert second["result"] == "keep"
    assert third == {
        "variant": "own_counts",
        "cases": {"case 0": "1.000 (1.000-1.000)", "case 1": "-"},
        "result": "unclear",
    }


def test_tactics_are_timed_one_by_one_and_those_not_worth_it_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tactics.json"
    monkeypatch.setattr(tactics, "names", lambda: ("one", "two", "three"))
    monkeypatch.setattr(tactics, "CASES", {name: Case(name, name, steps=2) for name in ("2x50", "3x70")})
    ratios = {"none": 1.0, "none (control)": 1.0, "one": 1.0, "two": 1.1, "three": 0.9, "one, three": 1.05}

    def measured(case: Case, tried: variants.Variants, *rest: Any) -> list[Result]:
        measure(case, tried, *rest)
        exact = [results(name, [ratios[name]])[0] for name in tried]
        return [dataclasses.replace(result, case=case.name) for result in exact]

    measure = variants.measure
    monkeypatch.setattr(variants, "measure", measured)
    options = ["--device", "cpu", "--seconds", "0.01", "--copy-mebibytes", "1", "--out", str(path)]
    assert tactics.main(options) == 0
    document = json.loads(path.read_text())
    assert [(result["case"], result["variant"]) for result in document["alone"]["results"]] == [
        (case, name) for case in ("2x50", "3x70") for name in ("none", "none (control)", "one", "two", "three")
    ]
    assert document["alone"]["results"][3]["interval"] == [1.1, 1.1]
    assert "one, three" in capsys.readouterr().out
    digest = stages.tactics(place(tmp_path)).digest([])
    assert digest.lines[1:] == [
        "",
        "| without | 2x50 | 3x70 | verdict |",
        "| --- | --- | --- | --- |",
        "| none | 1 s 90% | 1 s 90% |  |",
        "| none (control) | 1.000 (1.000-1.000) | 1.000 (1.000-1.000) | no difference |",
        "| one | 1.000 (1.000-1.000) | 1.000 (1.000-1.000) | no difference |",
        "| two | 1.100 (1.100-1.100) | 1.100 (1.100-1.100) | keep |",
        "| three | 0.900 (0.900-0.900) | 0.900 (0.900-0.900) | drop |",
        "",
        "| without these | 2x50 | 3x70 | verdict |",
        "| --- | --- | --- | --- |",
        "| none | 1 s 90% | 1 s 90% |  |",
        "| none (control) | 1.000 (1.000-1.000) | 1.000 (1.000-1.000) | no difference |",
        "| one, three | 1.050 (1.050-1.050) | 1.050 (1.050-1.050) | keep |",
    ]
    assert digest.figures["alone"] == document["alone"]["rows"]
    assert tactics.main([*options, "--tactics", "two", "--cases", "3x70"]) == 0
    document = json.loads(path.read_text())
    assert list(document["alone"]["rows"][-1]["cases"]) == ["3x70"]
    assert document["together"]["rows"] == []


def test_unknown_tactics_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tactics, "names", lambda: ("no_fences",))
    with pytest.raises(SystemExit) as stopped:
        tactics.main(["--device", "cpu", "--tactics", "fences", "--out", str(tmp_path / "tactics.json")])
    assert stopped.value.code == 2
    assert "unknown tactics fences: there are no_fences" in capsys.readouterr().err


# The tunables' sweep


def test_the_best_values_are_those_that_are_worth_it_on_average() -> None:
    tried: list[tuple[tune.Setting, tuple[float, float]]] = [
        ({}, (1.0, 1.0)),
        ({"chunk": 4096}, (0.96, 0.98)),
        ({"chunk": 16384}, (0.90, 1.20)),
        ({"window": 8 * tune.MIB}, (0.999, 0.999)),
        ({"blocks": 2}, (0.8, 0.9)),
        ({"blocks": 1, "chunk": 2048}, (0.5, 0.5)),
    ]
    found = [result for setting, ratios in tried for result in results(tune.label(setting), ratios)]
    assert tune.best_together(found, [setting for setting, _ in tried]) == {"chunk": 4096, "blocks": 2}
    first = tune.ranking(found)[0]
    assert (first["variant"], first["result"]) == ("blocks 1, chunk 2048", "0.500x")
    assert tune.label({"window": 12 * tune.MIB + tune.MIB // 2}) == "window 12.5 MiB"
    assert tune.combinations({"chunk": (1, 2), "blocks": (3,)}) == [
        {}, {"chunk": 1, "blocks": 3}, {"chunk": 2, "blocks": 3},
    ]  # fmt: skip


def test_a_sweep_times_every_setting_on_every_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tune.json"
    sweep = ["--chunk", "4096", "8192", "--blocks", "1", "--window", "--lead", "--prefetch", "--sets", "2x50", "3x70"]
    assert tune.main(["--device", "cpu", "--seconds", "0.01", "--copy-mebibytes", "1", "--out", str(path), *sweep]) == 0
    found = json.loads(path.read_text())["sweep"]["results"]
    settings = ["default", "chunk 4096", "chunk 8192", "blocks 1"]
    assert [(result["case"], result["variant"]) for result in found] == [
        (name, setting) for name in ("2x50", "3x70") for setting in settings
    ]
    assert all(result["step_s"]["median"] > 0 for result in found)
    assert "chunk 8192" in capsys.readouterr().out
    digest = stages.tune(place(tmp_path)).digest([])
    assert digest.lines[0] == "| one setting | 2x50 | 3x70 | average |"
    assert len(digest.lines) >= 2 + len(settings)


# The program that tools watch


RULES = (exercise.ADAMW, exercise.AMSGRAD, exercise.ADAN, exercise.GRADIENTS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.label)
@pytest.mark.parametrize("dtype", exercise.TOLERANCES, ids=str)
def test_right_backends_pass_the_exercise(
    rule: exercise.Rule, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exercise, "SIZES", ((1,), (3,), (0,), (64, 33), (4097,)))
    backends = (("reference", "cpu"), ("cpu", "cpu"))
    assert exercise.compare(rule, dtype, 1, 1.0, backends) <= exercise.TOLERANCES[dtype]


def test_the_exercise_notices_a_wrong_step_and_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise, "SIZES", ((64,), (9,)))
    backends = (("reference", "cpu"), ("cpu", "cpu"))

    def broken(value: float) -> float:
        step = exercise.agr_cuda.AdamW.step

        def wrong(self: torch.optim.Optimizer) -> None:
            step(self)
            if self.backend == "reference":
                with torch.no_grad():
                    self.param_groups[0]["params"][0][7] += value

        with monkeypatch.context() as patch:
            patch.setattr(exercise.agr_cuda.AdamW, "step", wrong)
            return exercise.compare(exercise.ADAMW, torch.float32, 0, 0.0, backends)

    assert broken(0.01) > exercise.TOLERANCES[torch.float32]
    assert not broken(float("nan")) <= exercise.TOLERANCES[torch.float32]


def test_exercised_tensors_lie_off_their_allocation() -> None:
    values = torch.randn(5, 3)
    tensor = exercise.placed(values, "cpu", 1)
    assert torch.equal(tensor, values)
    assert tensor.storage_offset() == 1
    assert tensor.is_contiguous()


# The whole


def test_a_report_leaves_its_files_and_prints_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = {"text": "AGR-AdamW: share", "verdict": "met", "shown": {"limit": ">= 90.0%", "measured": "95.0%"}}

    def stages(work: Path) -> list[Stage]:
        writes = f"open({str(work / 'figures.json')!r}, 'w').write('{{}}')"
        draws = f"open({str(work / 'step-cuda.png')!r}, 'w').write('picture')"
        return [
            stage("build", script(writes), digest=lambda runs: Digest(["built in 1 s"], {"targets": [target]})),
            stage("tests", script("print('a | long story'); raise SystemExit(1)")),
            stage("step", script(draws)),
        ]

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "step-of-yesterday.png").write_text("old")
    (folder / "yours.png").write_text("kept")
    assert make(folder, "NVIDIA Test", stages) == 1
    printed = capsys.readouterr().out
    summary = (folder / "SUMMARY.md").read_text()
    assert printed.endswith(summary)
    assert "build: ok" in printed
    assert "# GPU report: NVIDIA Test" in summary
    assert "| tests | **failed**: " in summary
    assert "a | long story" in summary
    assert "built in 1 s" in summary
    assert "| AGR-AdamW: share | >= 90.0% | 95.0% | met |" in summary
    files = {"SUMMARY.md", "details.tar.gz", "log.txt", "report.json", "step-cuda.png"}
    assert {path.name for path in folder.iterdir()} == files | {"yours.png"}
    assert all(name in summary for name in files)
    with tarfile.open(folder / "details.tar.gz") as archive:
        assert archive.getnames() == ["figures.json"]
    report = json.loads((folder / "report.json").read_text())
    assert [(entry["name"], entry["status"]) for entry in report["stages"]] == [
        ("build", "ok"), ("tests", "failed"), ("step", "ok"),
    ]  # fmt: skip
    assert make(folder, "NVIDIA Test", lambda work: [stage("build", script(""))]) == 0
    assert not (folder / "step-cuda.png").exists(), "it was the earlier report's"


def test_a_long_story_is_cut_short_in_the_summary() -> None:
    outcome = Outcome(
        "tests", "failed", 1.0, "exit code 1", tail=[f"line {number} " + "x" * 1000 for number in range(40)]
    )
    summary = render("a GPU", [outcome] * 9, 400.0, ["SUMMARY.md"])
    assert "line 39" in summary
    assert "line 31" not in summary
    assert len(summary) < 24_000


def test_without_a_gpu_the_report_says_so_and_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_report", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (message,) = done.stderr.splitlines()
    assert message.startswith("The GPU report needs an NVIDIA GPU")
    assert torch.__version__ in message
    assert not (tmp_path / "out").exists()


def test_unknown_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--stages", "polish"])
    assert stopped.value.code == 2
    assert "'polish'" in capsys.readouterr().err
