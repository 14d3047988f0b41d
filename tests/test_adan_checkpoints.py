"""State dicts in the form of sail-sg/Adan's code load and continue; restart_opt() starts afresh."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from helpers import (
    ADAN,
    all_params,
    assert_close,
    assert_same_bits,
    copies,
    give_gradients,
    oracle_gradients,
    oracle_parameter,
    parameters,
    run,
)
from torch import Tensor

import agr_cuda

SHAPES = [(7,), (64, 33), (), (0,), (1009,)]
STEPS = 6


def followed(params: list[Tensor], max_grad_norm: float, **options: Any) -> oracle.Adan:
    """The oracle after some steps from these parameters, to which they are then set."""
    expected = oracle.Adan([{"params": [oracle_parameter(p) for p in params]}], max_grad_norm=max_grad_norm, **options)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        give_gradients(params, generator, step)
        expected.step(oracle_gradients(params))
    with torch.no_grad():
        for p, q in zip(params, expected.params(), strict=True):
            p.copy_(torch.as_tensor(q.value))
            q.value = p.detach().double().cpu().numpy()
    return expected


def sail_checkpoint(expected: oracle.Adan, params: list[Tensor], foreach: bool) -> dict[str, Any]:
    """What sail-sg/Adan's state_dict() would hold: the step count in the group, no option of ours."""
    group = expected.groups[0]
    for p, q in zip(params, group.params, strict=True):
        q.state = {k: torch.as_tensor(v).to(p).double().cpu().numpy() for k, v in q.state.items()}
    return {
        "state": {
            index: {key: torch.as_tensor(value).to(p.detach()) for key, value in q.state.items()}
            for index, (p, q) in enumerate(zip(params, group.params, strict=True))
        },
        "param_groups": [
            {
                "lr": group["lr"], "betas": group["betas"], "eps": group["eps"],
                "weight_decay": group["weight_decay"], "max_grad_norm": expected.max_grad_norm,
                "no_prox": group["no_prox"], "foreach": foreach, "fused": False,
                "step": group.steps, "params": list(range(len(params))),
            }
        ],
    }  # fmt: skip


def go_on(ours: torch.optim.Optimizer, expected: oracle.Adan) -> None:
    generator = torch.Generator().manual_seed(4)
    for step in range(STEPS, STEPS + 5):
        give_gradients(all_params(ours), generator, step)
        ours.step()
        expected.step(oracle_gradients(all_params(ours)))
    assert_close(ours, expected)


@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("agr", [False, True])
def test_a_run_of_sails_continues_here(agr: bool, max_grad_norm: float, no_prox: bool, backend, device, generator):
    params = parameters(generator, SHAPES, device=device)
    options = {"lr": 5e-3, "betas": (0.97, 0.9, 0.98), "weight_decay": 0.1, "eps": 1e-7, "no_prox": no_prox}
    expected = followed(params, max_grad_norm, agr=agr, **options)
    ours = agr_cuda.Adan(copies(params), max_grad_norm=max_grad_norm, agr=agr, backend=backend)
    ours.load_state_dict(sail_checkpoint(expected, params, foreach=False))
    assert ours.param_groups[0]["agr"] is agr
    assert {key: ours.param_groups[0][key] for key in options} == options
    go_on(ours, expected)


def test_sails_default_foreach_loads(generator) -> None:
    """foreach=True, sail's default, asks for the reference backend here."""
    params = parameters(generator, SHAPES)
    expected = followed(params, 0.0)
    ours = agr_cuda.Adan(copies(params))
    ours.load_state_dict(sail_checkpoint(expected, params, foreach=True))
    go_on(ours, expected)


@pytest.mark.parametrize("missing", ["no_prox", "foreach", "fused", "max_grad_norm"])
def test_older_ones_lack_options(missing: str, generator) -> None:
    params = parameters(generator, SHAPES)
    expected = followed(params, 0.0)
    checkpoint = sail_checkpoint(expected, params, foreach=False)
    del checkpoint["param_groups"][0][missing]
    ours = agr_cuda.Adan(copies(params))
    ours.load_state_dict(checkpoint)
    go_on(ours, expected)


def test_state_and_group_keys_are_sails(backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    ours = agr_cuda.Adan(params, backend=backend)
    run(ours, 3)
    saved = ours.state_dict()
    sails = {"lr", "betas", "eps", "weight_decay", "no_prox", "foreach", "fused", "step", "params"}
    assert sails <= saved["param_groups"][0].keys()
    assert int(saved["param_groups"][0]["step"]) == 3
    for index, p in enumerate(params):
        state = saved["state"][index]
        assert state.keys() == set(ADAN.states)
        assert all(x.dtype == p.dtype and x.stride() == p.stride() for x in state.values())


def test_restart_opt_starts_afresh(backend, device, generator) -> None:
    """After it, the optimizer is a new one at the present parameters; and the first step has d = 0 again."""
    params = parameters(generator, SHAPES, device=device)
    ours = agr_cuda.Adan(params, lr=1e-2, backend=backend)
    run(ours, 4)
    ours.restart_opt()
    assert int(ours.param_groups[0]["step"]) == 0
    fresh = agr_cuda.Adan(copies(params), lr=1e-2, backend=backend)
    run(ours, 3, seed=8)
    run(fresh, 3, seed=8)
    assert_same_bits(ours, fresh)


def test_restart_opt_before_the_first_step_changes_nothing(backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    ours, plain = agr_cuda.Adan(params, backend=backend), agr_cuda.Adan(copies(params), backend=backend)
    ours.restart_opt()
    run(ours, 3)
    run(plain, 3)
    assert_same_bits(ours, plain)


def test_restart_opt_twice_in_a_run(backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    ours = agr_cuda.Adan(params, backend=backend)
    expected = oracle.Adan([{"params": [oracle_parameter(p) for p in params]}])
    for step in range(9):
        if step in (3, 6):
            ours.restart_opt()
            expected.restart()
        give_gradients(params, generator, step)
        ours.step()
        expected.step(oracle_gradients(params))
    assert_close(ours, expected)


def test_a_late_parameter_starts_with_no_difference(backend, device, generator) -> None:
    """d is 0 on a parameter's own first step, though the group has stepped before."""
    params = parameters(generator, SHAPES, device=device)
    ours = agr_cuda.Adan(params, backend=backend)
    expected = oracle.Adan([{"params": [oracle_parameter(p) for p in params]}])
    for step in range(8):
        give_gradients(params, generator, step)
        if step < 4:
            params[1].grad = None
        ours.step()
        expected.step(oracle_gradients(params))
    assert_close(ours, expected)
