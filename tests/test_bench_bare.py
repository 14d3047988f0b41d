"""The benchmarks on a machine that was set up for training alone: PyTorch, NumPy, and no package to show results."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
MISSING = ["scipy", "matplotlib", "PIL", "rich", "sklearn", "optimi", "pytorch_optimizer"]
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({MISSING}))
from bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments):
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_command_is_there():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


STEP = ["step", "--device", "cpu", "--rounds", 2, "--copy-mebibytes", 1, "--sets", "2x100", "--contenders", "agr-adamw"]
SWEEP = ["sweep", "--device", "cpu", "--rounds", 2, "--seconds", 0.1, "--counts", 1, "--elements", 30]


@pytest.mark.parametrize(("name", "arguments"), [("step-cpu-float32", STEP), ("sweep-cpu", SWEEP)])
def test_what_is_measured_is_written_and_not_drawn(name, arguments, tmp_path):
    done = run(*arguments, "--out", tmp_path, "--tag", "bare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}-bare.json, and no picture, since matplotlib is not installed" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}-bare.json"]


def test_trainings_are_kept_without_tables(tmp_path):
    search = ["--setting", "tiny", "--tasks", "gpt", "--arms", "adamw", "--seeds", 1, "--sets", 1, "--jobs", 1]
    done = run("train", *search, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No tables, since scipy is not installed." in done.stdout
    assert "train-tiny.json, and no picture, since " in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"train-tiny.json", "train-tiny.jsonl"}
