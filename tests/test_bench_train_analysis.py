"""How runs of `python -m bench train` are judged."""

import math
from dataclasses import replace

import pytest
import torch
from benchmarks import result

# Imports follow what they need, which is not there on a machine that was set up for training alone.
# ruff: noqa: E402
stats = pytest.importorskip("scipy.stats")

from bench.reporting import train_tables
from bench.training import analysis
from bench.training.analysis import FINAL, HIGHER, LOWER, NONE, OPEN, Runs, holm, steps_to
from bench.training.arms import ARMS
from bench.training.settings import SETTINGS


def document(rows, setting=SETTINGS["full"], tasks=("resnet",), chosen=()):
    searched = [result(task=task, arm=arm, seed=0, judged=False) for task in tasks for arm in ("adamw", "adan")]
    return {
        "settings": {"tasks": [*tasks]},
        "design": setting.record(),
        "runs": [r.record() for r in [*searched, *chosen, *rows]],
    }


def of_losses(arm, losses, task="resnet", **more):
    return [result(task, arm, 1000 + seed, [9.0, loss], **more) for seed, loss in enumerate(losses)]


def power_of_a_t_test(effect, count):
    """Return with which probability the paired t-test finds an effect of so many standard deviations."""
    edge = stats.t.ppf(1 - analysis.LEVEL / 2, count - 1)
    shift = effect * count**0.5
    return stats.nct.sf(edge, count - 1, shift) + stats.nct.cdf(-edge, count - 1, shift)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_differences_are_paired_by_seed(generator):
    base = torch.rand(10, generator=generator).double() + 1
    ours = base + 0.01 * torch.randn(10, generator=generator).double() - 0.02
    runs = Runs(document([*of_losses("adamw", base.tolist()), *reversed(of_losses("agr-adamw", ours.tolist()))]))
    (found,) = runs.compare("agr-adamw", "adamw")
    wanted = stats.ttest_rel(ours, base)
    interval, mean = wanted.confidence_interval(0.95), base.mean().item()
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.lower, found.upper) == pytest.approx((interval.low / mean, interval.high / mean))
    assert found.difference == pytest.approx((ours.mean() - base.mean()).item() / mean)
    assert found.pairs == 10
    power = power_of_a_t_test(found.detectable / found.spread, 10)
    assert power == pytest.approx(0.8, abs=0.03)


def test_p_is_corrected_over_tasks():
    rows = []
    for task, shift in (("gpt", 0.02), ("resnet", 0.0), ("vit", 0.0), ("ddpm", 0.0)):
        noise = [0.01 * (-1) ** i * (1 + i / 10) for i in range(10)]
        rows += of_losses("adamw", [1.0] * 10, task)
        rows += of_losses("agr-adamw", [1 + shift + n for n in noise], task)
    every = Runs(document(rows, tasks=("gpt", "resnet", "vit", "ddpm"))).compare("agr-adamw", "adamw")
    of_one = [r for r in rows if r.run.task == "gpt"]
    (alone,) = Runs(document(of_one, tasks=("gpt",))).compare("agr-adamw", "adamw")
    assert every[0].p == pytest.approx(4 * alone.p)


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [
        (-0.02, 0.01, LOWER),
        (0.02, 0.01, HIGHER),
        (-0.001, 0.0001, f"{LOWER}, below interest"),
        (0.001, 0.0001, f"{HIGHER}, below interest"),
        (0.0001, 0.001, NONE),
        (0.0, 0.05, OPEN),
        (0.0, 0.0, NONE),
        (-0.02, 0.0, LOWER),
    ],
)
def test_verdicts(mean, spread, verdict):
    losses = [1 + mean + spread * (-1) ** i for i in range(10)]
    runs = Runs(document([*of_losses("adamw", [1.0] * 10), *of_losses("agr-adamw", losses)]))
    (found,) = runs.compare("agr-adamw", "adamw")
    assert found.verdict == verdict


def test_sets_are_judged_apart():
    rows = of_losses("adamw", [1.0] * 4) + of_losses("agr-adamw", [0.9, 0.9, 0.91, 0.9])
    other = [replace(r, run=replace(r.run, seed=r.run.seed + 1000)) for r in rows[:4]]
    worse = [replace(r, run=replace(r.run, arm="agr-adamw"), held_out=[9.0, 1.2]) for r in other]
    runs = Runs(document([*rows, *other, *worse]))
    first, second = (runs.compare("agr-adamw", "adamw", first=first)[0] for first in (1000, 2000))
    assert (first.difference, second.difference) == (pytest.approx(-0.0975), pytest.approx(0.2))
    assert runs.compare("agr-adamw", "adamw")[0].pairs == 8


def test_seeds_that_are_not_asked_for_do_not_count():
    """A store may hold sets of an earlier command."""
    rows = of_losses("adamw", [1.0] * 4) + of_losses("agr-adamw", [1.0, 1.0, 9.0, 9.0])
    runs = Runs(document(rows, setting=replace(SETTINGS["full"], sets=(1000,), seeds=2)))
    (found,) = runs.compare("agr-adamw", "adamw")
    assert (found.pairs, found.difference) == (2, 0)


def test_a_task_is_judged_when_its_search_is_over_for_all_optimizers():
    """An interruption may come between them."""
    unfinished = document([*of_losses("adamw", [1.0, 1.1]), *of_losses("agr-adamw", [1.0, 1.1])])
    unfinished["runs"] = [run for run in unfinished["runs"] if run["arm"] != "adan"]
    assert Runs(unfinished).tasks == []
    assert train_tables.verdicts(Runs(unfinished)).rows


def test_an_arm_that_always_diverges_is_told():
    rows = [*of_losses("adamw", [1.0, 1.1]), *of_losses("agr-adamw", [None, None])]
    of_arm = dict(train_tables.levels(Runs(document(rows))).rows)
    assert of_arm["AGR-AdamW"] == "2 diverged"
    assert of_arm["AGR-Adan"] == "-"


def test_no_spread_is_a_number():
    rows = [*of_losses("adamw", [1.0, 1.0]), *of_losses("adamw-bit", [1.0, 1.0])]
    assert dict(train_tables.detectable(Runs(document(rows))).rows)["AdamW, one bit"] == "0%"


def test_an_arm_is_judged_at_both_points():
    own = result(arm="agr-adamw", seed=0, lr=0.5, judged=False)
    rows = [*of_losses("adamw", [1.0] * 3), *of_losses("agr-adamw", [1.1] * 3)]
    rows += of_losses("agr-adamw", [0.7] * 3, lr=0.5)
    rows += of_losses("adamw", [0.8] * 3, lr=0.5)
    runs = Runs(document(rows, chosen=[own]))
    assert runs.compare("agr-adamw", "adamw")[0].difference == pytest.approx(0.1)
    assert runs.compare("agr-adamw", "adamw", own=True)[0].difference == pytest.approx(-0.3)
    assert runs.compare("agr-adamw", "adamw", both_own=True)[0].difference == pytest.approx(-0.125)


def test_runs_that_diverged_have_no_loss_and_are_counted():
    rows = [*of_losses("adamw", [1.0, 1.1, 1.0]), *of_losses("agr-adamw", [1.0, None, 1.0])]
    rows += of_losses("adamw-placebo", [1.0, 1.1, 1.2])
    runs = Runs(document(rows, setting=replace(SETTINGS["full"], sets=(1000,), seeds=3)))
    assert runs.compare("agr-adamw", "adamw")[0].pairs == 2
    assert runs.diverged("resnet", "agr-adamw") == 1
    told = dict(train_tables.verdicts(runs).rows)
    assert told["AGR-AdamW"] == "0% (0% to 0%), 2 of 3 pairs, none of interest"
    assert "pairs" not in told[ARMS["adamw-placebo"].label]
    assert ", 2 of 3 pairs, p " in train_tables.beside_placebo(runs).rows[0][1]


def test_steps_to_a_loss():
    assert steps_to(result(losses=[3.0, 2.0, 1.0, 0.5]), 1.5, 400) == pytest.approx(250)
    assert steps_to(result(losses=[3.0, None, 1.0, 0.5]), 2.0, 400) == pytest.approx(300)
    assert steps_to(result(losses=[1.0, 0.5]), 1.5, 400) == pytest.approx(200)
    assert steps_to(result(losses=[3.0, 2.0]), 1.5, 400) is None


def test_every_measure_is_told():
    rows = of_losses("adamw", [1.0, 1.2]) + of_losses("agr-adamw", [1.0, 1.1], eigenvalue=6.0, score=0.25)
    runs = Runs(document(rows))
    found = {name: runs.compare("agr-adamw", "adamw", name) for name in runs.measures}
    assert found["largest eigenvalue, log10"][0].difference == pytest.approx(math.log10(2))
    assert found["increase by a push of 30%"][0].difference == 0
    assert found["error rate"][0].difference == pytest.approx(0.25)  # points, not a share
    assert next(iter(found)) == FINAL
