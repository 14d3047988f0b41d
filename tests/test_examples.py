"""The examples: they train, report what they measured, stop cleanly, and refuse bad options."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

matplotlib_image = pytest.importorskip("matplotlib.image")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"
OPTIMIZERS = ["AdamW", "AGR-AdamW", "Adan", "AGR-Adan"]
TINY = {
    "train_language_model": [
        *("--steps", "24", "--batch-size", "4", "--context", "16", "--layers", "1", "--width", "16", "--heads", "2"),
        *("--evaluations", "3", "--held-out-batches", "2", "--text-size", "0.2", "--sample-length", "20"),
    ],
    "classify_digits": ["--seeds", "2", "--epochs", "1", "--channels", "4"],
}
OPTIONS = [
    "device",
    "batch-size",
    "optimizers",
    "adamw-lr",
    "adan-lr",
    "weight-decay",
    "max-grad-norm",
    "warmup",
    "backend",
    "state-dtype",
]
OPTIONS += ["seed", "threads", "output"]
OWN_OPTIONS = {
    "train_language_model": [
        *("steps", "context", "layers", "width", "heads", "dtype", "text", "pattern", "text-size", "evaluations"),
        *("held-out-batches", "sample-length"),
    ],
    "classify_digits": ["seeds", "epochs", "channels"],
}


@pytest.fixture
def load(monkeypatch):
    """Import a module of examples/, as running a script there does; the examples set the number of threads."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=TINY)
def finished(request, tmp_path_factory):
    """Run a tiny example as a user does; gives its output and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [
        sys.executable,
        EXAMPLES / f"{request.param}.py",
        *TINY[request.param],
        "--threads",
        "1",
        "--output",
        folder,
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout, folder


def read_results(folder):
    """Read results.json as strictly as JSON is defined, without Python's NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def is_picture(path):
    """Whether the file is a picture that shows more than one colour."""
    pixels = matplotlib_image.imread(path)
    return pixels.shape[0] > 300 and pixels.shape[1] > 600 and pixels.std() > 0


def test_the_table_has_a_row_for_every_optimizer(finished):
    output, _ = finished
    rows = [line.split() for line in output.splitlines() if line.rstrip().endswith("cpu")]
    assert [row[0] for row in rows] == OPTIMIZERS
    assert all("ms" in row and any(cell.endswith("%") for cell in row) for row in rows)


def test_every_loss_is_finite_and_lower_at_the_end(finished):
    _, folder = finished
    for run in read_results(folder)["runs"]:
        assert all(map(math.isfinite, run["train_loss"]))
        evaluated = run.get("held_out_loss") or run["test_loss"]
        assert len(evaluated) == len(run["evaluated_at"])
        assert evaluated[-1] < 0.95 * evaluated[0]


def test_all_optimizers_start_from_the_same_weights_and_batches(finished):
    _, folder = finished
    first: dict[int, set[float]] = {}
    for run in read_results(folder)["runs"]:
        first.setdefault(run["seed"], set()).add(run["train_loss"][0])
    assert all(len(losses) == 1 for losses in first.values())
    assert len(set.union(*first.values())) == len(first), "seeds differ"


def test_agr_changes_the_course_of_training(finished):
    _, folder = finished
    losses = {(run["optimizer"], run["seed"]): run["train_loss"] for run in read_results(folder)["runs"]}
    for optimizer, seed in losses:
        if not optimizer.startswith("AGR"):
            assert losses[optimizer, seed] != losses[f"AGR-{optimizer}", seed]


def test_results_say_what_was_run(finished):
    _, folder = finished
    results = read_results(folder)
    assert results["environment"]["torch"] == torch.__version__
    assert results["options"]["threads"] == 1
    assert not results["interrupted"]
    for run in results["runs"]:
        assert run["agr"] == run["optimizer"].startswith("AGR")
        assert run["backends"] == ["cpu"]
        assert run["steps"] == len(run["train_loss"])
        assert run["state_bytes"] >= (8 if "AdamW" in run["optimizer"] else 16) * run["parameters"]
        assert 0 < run["median_optimizer_seconds"] < run["median_step_seconds"]
        assert 0 < run["median_optimizer_share"] < 1


def test_the_picture_is_saved_and_its_place_told(finished):
    output, folder = finished
    assert is_picture(folder / "curves.png")
    assert f"Picture: {folder / 'curves.png'}" in output


@pytest.mark.parametrize("name", TINY)
def test_help_explains_every_option_with_its_default(name, load, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(name).main(["--help"])
    shown = capsys.readouterr().out
    options = OPTIONS + OWN_OPTIONS[name]
    assert stopped.value.code == 0
    assert [option for option in options if f"--{option} " not in shown] == []
    assert " ".join(shown.split()).count("(default:") == len(options)


@pytest.mark.parametrize(
    ("name", "bad", "named"),
    [
        ("train_language_model", ["--steps", "0"], "'0' is not a whole number of at least 1"),
        ("train_language_model", ["--steps", "many"], "'many' is not a whole number"),
        ("train_language_model", ["--width", "30", "--heads", "4"], "30 is not a multiple of --heads 4"),
        ("train_language_model", ["--adan-lr", "0"], "'0' is not a number above 0"),
        ("train_language_model", ["--weight-decay", "nan"], "'nan' is not a number of at least 0"),
        ("train_language_model", ["--warmup", "1.5"], "'1.5' is not a number of at least 0 and at most 1"),
        ("train_language_model", ["--optimizers", "adamw", "sgd"], "'sgd' (choose from"),
        ("train_language_model", ["--device", "abacus"], "'abacus' is no device that is there"),
        ("train_language_model", ["--text", "/there/is/none"], "'/there/is/none' has 0 files named '*.py'"),
        ("train_language_model", ["--context", "999999"], "999999 bytes do not fit"),
        ("train_language_model", ["--output", "/dev/null/below"], "'/dev/null/below'"),
        ("classify_digits", ["--seeds", "-1"], "'-1' is not a whole number of at least 1"),
        ("classify_digits", ["--backend", "abacus"], "'abacus' (choose from"),
    ],
)
def test_bad_options_are_refused_by_value(name, bad, named, load, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        load(name).main(["--output", str(tmp_path), *TINY[name], *bad])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_refused_with_the_reason(load, capsys, monkeypatch):
    command_line = load("command_line")

    def missing(*arguments, **options):
        raise RuntimeError(f"backend={options['backend']!r} is not there: no such GPU")

    monkeypatch.setattr(command_line.agr_cuda, "AdamW", missing)
    with pytest.raises(SystemExit) as stopped:
        load("classify_digits").main(["--backend", "cuda"])
    assert stopped.value.code == 2
    assert "--backend: backend='cuda' is not there: no such GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("steps", [0, 7])
def test_ctrl_c_reports_what_is_done_so_far(name, steps, load, capsys, monkeypatch, tmp_path):
    common = load("common")
    advance, made = common.Run.advance, []

    def advance_until(run, *arguments):
        if len(made) == steps:
            raise KeyboardInterrupt
        made.append(run)
        advance(run, *arguments)

    monkeypatch.setattr(common.Run, "advance", advance_until)
    assert load(name).main([*TINY[name], "--output", str(tmp_path)]) == 130
    output = capsys.readouterr().out
    assert all(f"  {optimizer} " in output for optimizer in OPTIMIZERS)
    assert is_picture(tmp_path / "curves.png")
    results = read_results(tmp_path)
    assert results["interrupted"]
    assert sum(run["steps"] for run in results["runs"]) == steps


@pytest.mark.parametrize("name", TINY)
def test_the_backend_asked_for_is_used(name, load, tmp_path):
    options = [*TINY[name], "--backend", "reference", "--optimizers", "agr-adan", "adamw", "--output", str(tmp_path)]
    assert load(name).main(options) == 0
    runs = {run["optimizer"]: run["backends"] for run in read_results(tmp_path)["runs"]}
    assert runs == {"AGR-Adan": ["reference"], "AdamW": ["reference"]}


@pytest.mark.parametrize(("chosen", "at_most"), [("float32", 8.1), ("bfloat16", 4.1), ("8bit", 2.5)])
def test_the_state_has_the_type_asked_for(chosen, at_most, load, tmp_path):
    wide = ["--width", "64", "--steps", "2", "--optimizers", "agr-adamw", "--output", str(tmp_path)]
    options = [*TINY["train_language_model"], *wide, "--state-dtype", chosen]
    assert load("train_language_model").main(options) == 0
    (run,) = read_results(tmp_path)["runs"]
    assert at_most / 2 < run["state_bytes"] / run["parameters"] < at_most


def test_a_diverged_run_is_reported_too(load, capsys, tmp_path):
    diverging = ["--adamw-lr", "1e30", "--steps", "6", "--max-grad-norm", "0", "--output", str(tmp_path)]
    assert load("train_language_model").main([*TINY["train_language_model"], *diverging]) == 0
    runs = read_results(tmp_path)["runs"]
    assert runs[0]["train_loss"][-1] is None
    assert "Written by the A" in capsys.readouterr().out, "the best model that did not diverge"


def test_held_out_files_are_not_trained_on(load, tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([i]) * 10)
    corpus = load("corpus").read_corpus(tmp_path, "*.txt", limit=10**6)
    assert set(corpus.held_out.tolist()) == {9, 19}
    assert set(corpus.train.tolist()) == set(range(25)) - {9, 19}


def test_other_optimizers_learn_with_agr():
    command = [sys.executable, EXAMPLES / "other_optimizers.py", "--steps", "200"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found = dict(re.findall(r"^(\w+(?: with AGR)?) +([\d.]+)% right, mean norm [\d.]+$", process.stdout, re.MULTILINE))
    names = ["SGD", "Muon"] if hasattr(torch.optim, "Muon") else ["SGD"]
    assert list(found) == [f"{name}{agr}" for name in names for agr in ("", " with AGR")]
    assert all(float(share) > 80 for share in found.values())
    assert len({line[10:] for line in process.stdout.splitlines()}) == len(found), "AGR changes the course of training"


def test_the_ways_to_train_in_16_bits_are_told_and_drawn(tmp_path):
    picture = tmp_path / "new" / "losses.png"
    written = tmp_path / "new" / "losses.json"
    command = [sys.executable, EXAMPLES / "train_in_16_bits.py", "--steps", "10", "--picture", picture]
    command += ["--results", written]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    rows = re.findall(r"^ *(.+?) +[\d.]+ +([+-][\d.]+)% +([\d,]+) bytes *$", process.stdout, re.MULTILINE)
    stored = {name: int(size.replace(",", "")) for name, _, size in rows}
    assert list(stored) == [
        "float32",
        "float32, 8-bit state",
        "bfloat16, float32 master",
        "bfloat16, stochastic rounding",
        "bfloat16, rounded to nearest",
    ]
    found = json.loads(written.read_text())["rows"]
    assert {row["stored_as"]: row["stored_bytes"] for row in found} == stored
    assert all(row["steps"] == list(range(11)) and len(row["losses"]) == 11 for row in found)
    assert stored["bfloat16, stochastic rounding"] == stored["bfloat16, rounded to nearest"]
    assert stored["float32, 8-bit state"] < 0.6 * stored["float32"] < stored["bfloat16, float32 master"]
    assert is_picture(picture)


def test_stochastic_rounding_follows_float32_where_rounding_to_nearest_stalls(load):
    results = load("train_in_16_bits").main(["--steps", "400"])
    loss = {result.storage.label: result.losses[-1] for result in results}
    float32, begin = loss["float32"], results[0].losses[0]
    assert float32 < 0.75 * begin
    assert loss["bfloat16, stochastic rounding"] == pytest.approx(float32, rel=0.02)
    assert loss["bfloat16, float32 master"] == pytest.approx(float32, rel=0.01)
    assert loss["bfloat16, rounded to nearest"] > 0.9 * begin


def test_coefficients_are_watched_told_and_drawn(load, capsys, tmp_path):
    picture = tmp_path / "new" / "shares.png"
    written = tmp_path / "other" / "shares.json"
    small = ["--steps", "4", "--layers", "1", "--width", "16", "--picture", str(picture), "--results", str(written)]
    watched = load("watch_coefficients").main(small)
    rows = re.findall(
        r"^ *(\w+) +(\d+) +[\d,]+ to [\d,]+ +\S+% to \S+% +[\d.]+ *$", capsys.readouterr().out, re.MULTILINE
    )
    assert rows == [("matrix", "5"), ("embedding", "2"), ("norm", "6"), ("bias", "5")]
    assert sum(int(count) for _, count in rows) == len(watched.sizes)
    assert watched.steps == [0, 1, 2, 3]
    stored = json.loads(written.read_text())
    assert stored["steps"] == watched.steps
    assert {row["name"]: row["removed"] for row in stored["rows"]} == watched.removed
    for name, shares in watched.removed.items():
        assert len(shares) == 4
        assert all(0.999 / watched.sizes[name] <= share <= 1 for share in shares), "from 1/n, all alike, to 1"
    assert is_picture(picture)


def test_sharded_training_is_killed_goes_on_and_is_unsharded_training(tmp_path):
    options = ["--steps", "9", "--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--resume-on", "1"]
    command = [sys.executable, EXAMPLES / "demo_fsdp.py", *options, "--device", "cpu", "--output", tmp_path / "new"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert float(re.search(r"Largest relative difference of any step's loss: (\S+)\.$", process.stdout, re.M)[1]) < 1e-5
    records = [json.loads(line) for line in (tmp_path / "new" / "parts" / "losses.jsonl").read_text().splitlines()]
    # Killed in step 6, counted from 1, after the checkpoint of 5 steps.
    assert [(r["step"], r["processes"]) for r in records] == [
        *((i, 2) for i in range(5)),
        *((i, 1) for i in range(5, 9)),
    ]
    assert is_picture(tmp_path / "new" / "curves.png")


def test_every_parameter_is_in_the_group_that_suits_it(load):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.PReLU(), torch.nn.Linear(2, 1))
    groups = load("common").parameter_groups(model, weight_decay=0.1, agr=True)
    found = [(tuple(p.shape), group["weight_decay"], group["agr"]) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(
        [
            ((2, 3), 0.1, True),
            ((2,), 0.0, True),
            ((2,), 0.0, True),
            ((2,), 0.0, True),
            ((1,), 0.0, False),
            ((1, 2), 0.1, True),
            ((1,), 0.0, False),
        ]
    )
