"""The command line of the benchmarks on tiny sets: step, release, sharded, store, and arguments that are refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.commands import release, sharded
from bench.measuring import stats
from bench.workloads import building, contenders
from bench.workloads.contenders import ALL, BY_NAME, PRECISION, YARDSTICK

ROOT = Path(__file__).resolve().parent.parent


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
