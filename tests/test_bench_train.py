"""`python -m bench train`: its arms, its search, what it keeps when it is interrupted, and how runs are judged."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy
import pytest
import torch
from benchmarks import refusal, result
from torch import nn

import agr_cuda
from bench.__main__ import main
from bench.tasks import SIZES, digits, text
from bench.training import plan, workers
from bench.training.arms import ARMS, centralize, flip_a_bit, normalize, placebo
from bench.training.plan import Point
from bench.training.run import Result, Run, learning_rate, train
from bench.training.settings import SETTINGS, Setting
from bench.training.sharpness import largest_eigenvalue, perturbed_increase
from bench.training.store import Store, UnusableStoreError
from bench.training.workers import Workers

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = replace(SETTINGS["tiny"], steps={"gpt": 4, "resnet": 4, "vit": 4, "ddpm": 4})


class TestArms:
    def test_a_placebo_has_agr_s_coefficients_in_another_order(self, generator):
        gradient = torch.randn(7, 11, generator=generator)
        wanted = gradient.abs() / gradient.abs().sum()
        changed = gradient.clone()
        placebo(changed, generator)
        found = 1 - changed / gradient
        torch.testing.assert_close(found.flatten().sort()[0], wanted.flatten().sort()[0], rtol=1e-4, atol=1e-7)
        assert not torch.allclose(found, wanted, rtol=0.1, atol=0)
        again = gradient.clone()
        placebo(again, generator)
        assert not torch.equal(again, changed)  # shuffled anew
        placebo(zeros := torch.zeros(3), generator)
        assert zeros.eq(0).all()

    def test_centralized_gradients_have_no_mean(self, generator):
        gradient = torch.randn(4, 3, 2, 2, generator=generator)
        bias = torch.randn(4, generator=generator)
        for given in (gradient, kept := bias.clone()):
            centralize(given, generator)
        torch.testing.assert_close(gradient.mean((1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-6)
        assert torch.equal(kept, bias)

    def test_normalized_gradients_have_a_root_mean_square_of_1(self, generator):
        gradient = 1e-4 * torch.randn(5, 6, generator=generator)
        direction = gradient / gradient.norm()
        normalize(gradient, generator)
        torch.testing.assert_close(gradient, direction * 30**0.5)

    def test_one_bit_is_flipped(self):
        model = nn.Linear(3, 2)
        before = [p.detach().clone().view(torch.int32) for p in model.parameters()]
        flip_a_bit(model, lambda: model(torch.tensor([0.0, 2.0, 3.0])).sum())  # on the first weight nothing depends
        differing = [b ^ p.detach().view(torch.int32) for b, p in zip(before, model.parameters(), strict=True)]
        assert torch.cat([d.flatten() for d in differing]).tolist() == [0, 1] + [0] * 6

    def test_agr_is_where_an_arm_says(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        for arm in ARMS.values():
            optimizer = arm.optimizer(model, 0.1, 0.05)
            assert type(optimizer) is {"AdamW": agr_cuda.AdamW, "Adan": agr_cuda.Adan}[arm.rule]
            on = {id(p) for group in optimizer.param_groups if group["agr"] for p in group["params"]}
            decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
            for p in model.parameters():
                kind_is_matrix = p.dim() == 2
                assert decays[id(p)] == (0.05 if kind_is_matrix else 0)
                wanted = {"agr-adamw": True, "agr-adan": True, "agr-adamw-matrices": kind_is_matrix}
                assert (id(p) in on) == wanted.get(arm.name, False), arm.name
            assert optimizer.max_grad_norm == (1.0 if arm.name == "adamw-clipped" else None)

    def test_controls_search_nothing(self):
        assert {name for name, arm in ARMS.items() if not arm.searches} == {
            *("adamw-placebo", "adamw-bit", "adan-placebo", "adan-bit", "agr-adamw-matrices")
        }


class TestRuns:
    @pytest.mark.parametrize("task", SIZES["small"])
    def test_a_run_repeats_to_the_bit_and_arms_differ(self, task):
        torch.set_num_threads(1)
        arms = ("adamw", "adamw", "agr-adamw", "adamw-placebo")
        asked = [Run(task, arm, 0.01, 0.1, 1000, judged=True) for arm in arms]
        first, again, ours, control = (train(run, TINY, CPU) for run in asked)
        assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
        assert first.held_out[0] != first.held_out[1]
        assert len({first.held_out[-1], ours.held_out[-1], control.held_out[-1]}) == 3
        assert abs(ours.final / first.final - 1) < 0.02
        assert (first.score is not None) == (task in ("resnet", "vit"))
        assert first.eigenvalue
        assert len(first.increases) == 2
        assert Result.of_record(json.loads(json.dumps(first.record()))) == first

    def test_a_run_of_the_search_measures_no_sharpness(self):
        found = train(Run("resnet", "adamw", 0.01, 0.1, 0, judged=False), TINY, CPU)
        assert (found.eigenvalue, found.increases) == (None, [])

    def test_a_run_that_diverges_says_so(self):
        found = train(Run("gpt", "adamw", 1e20, 0.1, 0, judged=True), TINY, CPU)
        assert found.final == float("inf")
        assert json.loads(json.dumps(found.record(), allow_nan=False))["held_out"][-1] is None

    def test_the_learning_rate_rises_and_falls(self):
        rates = [learning_rate(step, 100, 0.1) for step in range(100)]
        assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        assert rates[10] == 1
        assert rates[55] == pytest.approx(0.5)
        assert rates[9:] == sorted(rates[9:], reverse=True)
        assert 0 < rates[-1] < 0.001

    def test_held_out_data_is_not_trained_on(self):
        images, classes = digits.read()
        assert images.shape == (1797, 1, 8, 8)
        assert (images.min(), images.max()) == (0, 1)
        assert classes.bincount().min() > 170
        trained, kept = digits.trained_on()[0], digits.held_out()[0]
        assert len(trained) + len(kept) == len(images)
        assert torch.equal(torch.cat([kept, trained]), images)
        first, second = text.corpus()
        assert (len(first), len(second)) == (text.BYTES, text.HELD_OUT_BYTES)
        assert bytes(second[:2000].tolist()) not in bytes(first.tolist())
        for tasks in SIZES.values():
            for task in tasks.values():
                for batch, same in zip(task.held_out(), task.held_out(), strict=True):
                    assert all(torch.equal(x, y) for x, y in zip(batch, same, strict=True))

    def test_digits_are_those_of_scikit_learn(self):
        found = pytest.importorskip("sklearn.datasets").load_digits()
        with numpy.load(digits.FILE) as stored:
            assert (stored["pixels"] == found.images).all()
            assert (stored["classes"] == found.target).all()

    @pytest.mark.parametrize(("size", "name"), [(size, name) for size, tasks in SIZES.items() for name in tasks])
    def test_every_size_takes_its_batches_and_has_no_tensor_of_one_element(self, size, name):
        """Of whose gradient AGR would leave nothing. On PyTorch's meta device, which has shapes alone."""
        task = SIZES[size][name]
        with torch.device("meta"):
            model = task.model()
        assert min(p.numel() for p in model.parameters()) > 1
        for batch in (next(task.batches(0)), *task.held_out()):
            moved = tuple(part.to("meta") for part in batch)
            assert task.loss(model, moved).shape == ()
            assert (task.score is None) == (name in ("gpt", "ddpm"))
            assert task.score is None or task.score[1](model, moved).shape == ()


class TestSharpness:
    def test_the_eigenvalue_of_a_quadratic(self, generator):
        basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
        matrix = basis @ torch.diag(torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, -8.0])) @ basis.T
        x, y = nn.Parameter(torch.randn(2, 2, generator=generator)), nn.Parameter(torch.randn(2, generator=generator))

        def loss():
            whole = torch.cat([x.flatten(), y])
            return whole @ matrix @ whole / 2

        assert largest_eigenvalue(loss, [x, y]) == pytest.approx(-8, rel=0.01)

    def test_a_push_has_the_size_that_it_says(self, generator):
        x, y = (nn.Parameter(torch.randn(50, generator=generator)) for _ in range(2))
        before = x.detach().clone(), y.detach().clone()
        centers = tuple(b.clone() for b in before)
        seen = []

        def loss():
            moved = [(p - c).norm() / c.norm() for p, c in zip((x, y), centers, strict=True)]
            seen.append([m.item() for m in moved])
            return moved[0] ** 2

        assert perturbed_increase(loss, [x, y], 0.3) == pytest.approx(0.09, rel=1e-4)
        assert seen[0] == [0, 0]
        assert numpy.allclose(seen[1:], 0.3, rtol=1e-4)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])


class TestPlan:
    def test_every_optimizer_has_the_same_search(self):
        setting = SETTINGS["full"]
        runs = plan.search(setting, ["gpt", "vit"])
        assert len({run.key for run in runs}) == len(runs)
        counts = {name: sum(run.arm == name for run in runs) for name in ARMS}
        assert {count for name, count in counts.items() if ARMS[name].searches} == {2 * 3 * 2 * 2}
        assert {count for name, count in counts.items() if not ARMS[name].searches} == {0}
        assert {run.seed for run in runs}.isdisjoint(
            first + place for first in setting.sets for place in range(setting.seeds)
        )

    def test_the_lowest_mean_is_chosen_and_a_run_that_diverged_is_not(self):
        searched = [
            result(arm="adamw", lr=0.1, seed=0, losses=[1.0, 0.1]),
            result(arm="adamw", lr=0.1, seed=1, losses=[1.0, None]),
            result(arm="adamw", lr=0.2, seed=0, losses=[1.0, 0.5]),
            result(arm="adamw", lr=0.2, seed=1, losses=[1.0, 0.7]),
            result(arm="agr-adamw", lr=0.3, losses=[1.0, 0.9]),
            result(arm="adan", lr=0.4, losses=[1.0, 0.9]),
        ]
        choices = plan.choose(searched)
        assert choices["resnet", "adamw"] == Point(0.2, 0.01)
        assert plan.target(searched, choices, "resnet", "adamw") == pytest.approx(1.05 * 0.6)
        runs = plan.judged(replace(SETTINGS["full"], seeds=1), ["resnet"], choices)
        assert len({run.key for run in runs}) == len(runs)
        first = [run for run in runs if run.seed == 1000]
        at = {name: [run.lr for run in first if run.arm == name] for name in ARMS}
        assert at["adamw"] == [0.2, 0.3]  # its own, and AGR's
        assert at["adamw-clipped"] == at["adamw-bit"] == at["adamw-placebo"] == at["agr-adamw-matrices"] == [0.2]
        assert at["agr-adamw"] == [0.2, 0.3]  # beside AdamW's, its own
        assert at["adan"] == at["agr-adan"] == [0.4]
        assert [run.seed for run in runs[:-2]] == sorted(run.seed for run in runs[:-2])
        assert [(run.arm, run.lr) for run in runs[-2:]] == [("adamw", 0.3)] * 2


class TestStore:
    SETTING: ClassVar = {"steps": {"gpt": 4}, "warmup": 0.1}

    def test_what_was_added_is_there_again(self, tmp_path):
        path = tmp_path / "folder" / "runs.jsonl"
        added = [result(seed=seed) for seed in range(3)]
        with Store(path, self.SETTING) as store:
            for one in added:
                store.add(one)
        with Store(path, self.SETTING) as store:
            assert [*store.results.values()] == added

    @pytest.mark.parametrize("cut", [1, 20, 200])
    def test_a_line_that_was_cut_off_is_dropped(self, tmp_path, cut):
        path = tmp_path / "runs.jsonl"
        with Store(path, self.SETTING) as store:
            store.add(result(seed=0))
            store.add(result(seed=1))
        path.write_bytes(path.read_bytes()[:-cut])
        with Store(path, self.SETTING) as store:
            assert [*store.results.values()] == [result(seed=0)]
            store.add(result(seed=2))
        with Store(path, self.SETTING) as store:
            assert [*store.results.values()] == [result(seed=0), result(seed=2)]

    def test_runs_of_another_setting_are_refused(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        with Store(path, self.SETTING) as store:
            store.add(result())
        before = path.read_bytes()
        with pytest.raises(
            UnusableStoreError, match=r"runs.jsonl holds runs with other settings \(warmup\): remove it"
        ):
            Store(path, {**self.SETTING, "warmup": 0.2})
        assert path.read_bytes() == before

    def test_one_process_at_a_time_adds_to_it(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        with Store(path, self.SETTING) as store:
            with pytest.raises(UnusableStoreError, match=r"runs.jsonl is in use by another process"):
                Store(path, self.SETTING)
            store.add(result(seed=0))
        with Store(path, self.SETTING) as store:
            assert [*store.results.values()] == [result(seed=0)]

    def test_a_file_that_is_refused_is_left_as_it_is(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        with Store(path, self.SETTING):
            pass
        path.write_bytes(path.read_bytes() + b"no json\ncut o")
        before = path.read_bytes()
        with pytest.raises(UnusableStoreError, match=r"runs.jsonl, line 2 is damaged"):
            Store(path, self.SETTING)
        assert path.read_bytes() == before
        path.write_bytes(before.replace(b"no json\n", b""))
        with pytest.raises(UnusableStoreError, match=r"\(more\)"):
            Store(path, {**self.SETTING, "more": 1})
        assert path.read_bytes().endswith(b"cut o")


def command(out, *more):
    words = ["train", "--setting", "tiny", "--tasks", "resnet", "--out", str(out), "--jobs", "2", *more]
    return [sys.executable, "-m", "bench", *words]


def end_at_once_or_never(run, setting, device):
    """Stands for a training."""
    if run.seed:
        time.sleep(1000)
    return run.seed


def test_an_interruption_does_not_wait_for_what_is_running(monkeypatch):
    monkeypatch.setattr(workers, "train", end_at_once_or_never)
    runs = [Run("resnet", "adamw", 1e-3, 0.0, seed, judged=False) for seed in (0, 1)]

    def interrupted():
        with Workers(2, SETTINGS["tiny"], CPU, None) as pool:
            assert next(pool.run(runs)) == 0
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - begin < 300
    assert not multiprocessing.active_children()


def finished(path):
    """Return how many runs are kept."""
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def begin(words, stdout):
    """Begin a process in a group of its own, which Ctrl-C interrupts even where the tests' runner ignores it."""
    return subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=stdout,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def is_alive(group):
    """Whether a group of processes has any."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, process=None):
    """Wait until something is so, while a process runs."""
    until = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)


class TestCommand:
    def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_results(self, tmp_path):
        path = tmp_path / "train-tiny.jsonl"
        process = begin(command(tmp_path), stdout=subprocess.DEVNULL)
        wait_for(lambda: finished(path) >= 6, process)  # of 12: search 4, judged 8
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not is_alive(process.pid))  # the processes that it started, too
        kept = finished(path)
        assert kept < 12
        before = path.read_bytes().splitlines()[: kept + 1]
        process = begin(command(tmp_path), stdout=subprocess.PIPE)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert path.read_bytes().splitlines()[: kept + 1] == before  # seconds included, so that nothing ran again
        document = json.loads((tmp_path / "train-tiny.json").read_text())
        assert document["complete"]
        assert len(document["runs"]) == 12
        for record in document["runs"][::5]:
            again = train(Run(**{name: record[name] for name in Run.__dataclass_fields__}), SETTINGS["tiny"], CPU)
            assert again.held_out == pytest.approx(record["held_out"], rel=1e-5)
        assert (tmp_path / "train-tiny.png").read_bytes().startswith(b"\x89PNG")
        assert "judged: 8 of 8, 0:00:00 left" in output
        assert "AGR-AdamW minus AdamW, every measure" in output
        assert "change of the final held-out loss" in output

    def test_an_interruption_keeps_what_is_done(self, tmp_path):
        path = tmp_path / "train-tiny.jsonl"
        process = begin(command(tmp_path), stdout=subprocess.PIPE)
        wait_for(lambda: finished(path) >= 2, process)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 130
        assert "Interrupted: the same command goes on" in output
        assert finished(path) >= 2

    def test_no_run_begins_after_the_time(self, tmp_path, capsys):
        arguments = [*command(tmp_path)[3:], "--minutes", "1e-9"]
        assert main(arguments) == 0
        document = json.loads((tmp_path / "train-tiny.json").read_text())
        assert not document["complete"]
        assert document["runs"] == []
        assert "not complete" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--setting", "huge"], "unknown setting 'huge': allowed are full, short, tiny"),
            (["--tasks", "mnist"], "unknown task 'mnist': allowed are gpt, resnet, vit, ddpm"),
            (["--arms", "sgd"], "unknown arm 'sgd': allowed are adamw"),
            (["--seeds", "0"], "'0' is not an integer of at least 1"),
            (["--minutes", "-1"], "'-1' is not a finite number above 0"),
        ],
    )
    def test_bad_arguments(self, arguments, message, capsys):
        assert message in refusal(["train", *arguments], capsys)

    @pytest.mark.parametrize("sets", [("1000", "1001"), ("0",), ("3000", "3000")])
    def test_sets_share_no_seed(self, sets, tmp_path, capsys):
        said = refusal([*command(tmp_path)[3:], "--seeds", "2", "--sets", *sets], capsys)
        assert f"sets of 2 seeds from {', '.join(sets)} overlap" in said
        assert not any(tmp_path.iterdir())

    def test_a_task_that_a_setting_does_not_have_is_named(self, tmp_path, capsys):
        said = refusal(["train", "--setting", "demo", "--tasks", "vit", "--out", str(tmp_path)], capsys)
        assert "setting demo has no task 'vit': allowed are gpt" in said

    def test_a_file_of_other_settings_is_left_alone(self, tmp_path, capsys):
        path = tmp_path / "train-tiny.jsonl"
        path.write_text('{"size": "small", "steps": {}}\n')
        assert "holds runs with other settings" in refusal(command(tmp_path)[3:], capsys)
        assert path.read_text() == '{"size": "small", "steps": {}}\n'

    def test_runs_of_another_release_of_pytorch_are_left_alone(self, tmp_path, capsys):
        path = tmp_path / "train-tiny.jsonl"
        assert main(command(tmp_path, "--minutes", "1e-9")[3:]) == 0
        path.write_text(path.read_text().replace(torch.__version__, "1.0"))
        assert "holds runs with other settings (torch)" in refusal(command(tmp_path)[3:], capsys)

    def test_arms_bring_the_optimizers_that_they_are_compared_with(self):
        from bench.commands.train import chosen_setting

        arguments = {
            "setting": "full",
            "tasks": None,
            "arms": ["agr-adan"],
            "sets": [5000],
            "seeds": 3,
        }
        setting = chosen_setting(type("Arguments", (), arguments)())
        assert isinstance(setting, Setting)
        assert (setting.arms, setting.sets, setting.seeds) == (("adamw", "adan", "agr-adan"), (5000,), 3)
