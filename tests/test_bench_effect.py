"""`python -m bench effect`: what AGR does to updates, beside the optimizers themselves."""

import json

import pytest
import torch
from helpers import METHODS
from torch import nn

import agr_cuda
from bench.__main__ import main
from bench.commands import effect
from bench.reporting.effect_rows import EffectRow
from bench.tasks import TASKS


def gradients(generator, named):
    return [torch.randn(n.parameter.shape, generator=generator) for n in named]


@pytest.fixture
def named():
    torch.manual_seed(0)
    return effect.named_parameters(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_updates_of_the_tensor_scope_are_those_of_agr(method, named, generator):
    shadow = effect.Shadow(method.name, named, lr=0.01)
    plain = effect.Shadow(method.name, named, lr=0.01)
    twins = [n.parameter.detach().clone().requires_grad_() for n in named]
    optimizer = method.ours(twins, lr=0.01, weight_decay=0.0)
    for step in range(5):
        given = gradients(generator, named)
        updates = shadow.updates(effect.of_tensor(named, given))
        without = plain.updates(given)
        before = [p.detach().clone() for p in twins]
        for p, g in zip(twins, given, strict=True):
            p.grad = g
        optimizer.step()
        for p, old, update, other in zip(twins, before, updates, without, strict=True):
            torch.testing.assert_close(p.detach() - old, update, rtol=1e-4, atol=1e-6)
            # The first update is the gradient's sign, whatever its size.
            assert step == 0 or not torch.allclose(update, other, rtol=1e-4, atol=0)


def test_scopes_take_the_sums_that_they_say(named, generator):
    given = gradients(generator, named)
    matrices = [n.kind == "matrix" for n in named]
    assert sum(matrices) == 2
    sums = [g.abs().sum() for g in given]
    of_kind = {which: sum(s for s, m in zip(sums, matrices, strict=True) if m == which) for which in (True, False)}
    wanted = {
        "tensor": sums,
        "row": [g.abs().sum(1, keepdim=True) if g.dim() > 1 else g.abs().sum() for g in given],
        "group": [of_kind[which] for which in matrices],
        "model": [sum(sums)] * len(given),
    }
    assert wanted.keys() == effect.SCOPES.keys()
    for scope, totals in wanted.items():
        for g, total, found in zip(given, totals, effect.SCOPES[scope](named, given), strict=True):
            torch.testing.assert_close(found, g * (1 - g.abs() / total))
    zeros = [torch.zeros_like(g) for g in given]
    for scope in effect.SCOPES.values():
        assert all((g == 0).all() for g in scope(named, zeros))


def test_the_law_is_fitted():
    rows = [
        EffectRow("task", "name", "matrix", 10, removed, "AdamW", "tensor", 0.3 * removed**0.9, 1.0)
        for removed in (0.5, 0.1, 0.001, 1e-6)
    ]
    other = [EffectRow("task", "name", "matrix", 10, 0.5, "AdamW", "row", 7.0, 1.0)]
    law = effect.fit([*rows, *other], "AdamW")
    assert (law.factor, law.exponent, law.r_squared, law.tensors) == (
        pytest.approx(0.3),
        pytest.approx(0.9),
        pytest.approx(1),
        4,
    )


@pytest.mark.parametrize("name", TASKS)
def test_tasks_train(name):
    """Each batch is another, the same seed gives the same, and the loss falls."""
    task = TASKS[name]
    torch.manual_seed(0)
    model = task.model()
    optimizer = agr_cuda.AdamW(model.parameters(), lr=task.lr)
    losses = []
    steps = 90 if name == "vit" else 25
    for _, batch, again in zip(range(steps), task.batches(0), task.batches(0), strict=False):
        assert all(torch.equal(x, y) for x, y in zip(batch, again, strict=True))
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    first, second = (batch for _, batch in zip(range(2), task.batches(0), strict=False))
    assert not torch.equal(first[0], second[0])


def test_the_command_writes_what_it_found(tmp_path, capsys):
    arguments = ["effect", "--tasks", "vit", "--steps", "22", "--out", str(tmp_path), "--tag", "here"]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "effect-here.json").read_text())
    model = TASKS["vit"].model()
    rows = document["rows"]
    assert len(rows) == len(list(model.parameters())) * len(effect.RULES) * len(effect.SCOPES)
    assert {row["name"] for row in rows} == {name for name, _ in model.named_parameters()}
    for row in rows:
        assert 1 / row["elements"] <= row["removed"] * (1 + 1e-5) <= 1 + 1e-5
        assert 0 <= row["change"] <= row["largest_change"] < 2
    assert {law["rule"] for law in document["laws"]} == set(effect.RULES)
    assert (tmp_path / "effect-here.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "relative change of AdamW's update by AGR" in said


def test_an_unknown_task_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["effect", "--tasks", "mnist"])
    assert "unknown task 'mnist': allowed are gpt, resnet, vit" in capsys.readouterr().err
