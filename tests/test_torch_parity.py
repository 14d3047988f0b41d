"""agr=False is torch.optim.AdamW, option by option; agr=True is torch.optim.AdamW fed psi(g)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from conftest import takes
from helpers import SHAPES, assert_parameters_close, copies, gradient, parameters, to_numpy

import agr_cuda

STEPS = 12
GRADIENTS = Callable[[torch.Tensor], torch.Tensor]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "maximize": True},
    {"weight_decay": 0.0},
    {"weight_decay": 0.5},
    {"lr": 0.1, "betas": (0.5, 0.6)},
    {"eps": 1e-2},
    {"lr": 0.0},
]


def name(options: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


def psi(g: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(oracle.psi(to_numpy(g))).to(g)


def same(g: torch.Tensor) -> torch.Tensor:
    return g


def follow(ours: Any, theirs: Any, fed: GRADIENTS, bound: float | None = None) -> None:
    """Steps both, ours on g and torch's on fed(g), and compares parameters and states."""
    generator = torch.Generator().manual_seed(5)
    mine = [p for group in ours.param_groups for p in group["params"]]
    other = [p for group in theirs.param_groups for p in group["params"]]
    for step in range(STEPS):
        for p, q in zip(mine, other, strict=True):
            g = gradient(p, generator, step)
            p.grad, q.grad = g, fed(g).clone()
        ours.step()
        theirs.step()
    assert_parameters_close(mine, other, bound)
    for p, q in zip(mine, other, strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert_parameters_close([ours.state[p][key]], [value], bound)
            assert ours.state[p][key].dtype == value.dtype


def double_or_single(backend: str) -> torch.dtype:
    return torch.float64 if takes(backend, torch.float64) else torch.float32


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_without_agr_it_is_torchs_adamw(options: dict, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, double_or_single(backend), device)
    theirs = torch.optim.AdamW(copies(params), **options)
    follow(agr_cuda.AdamW(params, agr=False, backend=backend, **options), theirs, same)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_with_agr_it_is_torchs_adamw_fed_psi(options: dict, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, double_or_single(backend), device)
    theirs = torch.optim.AdamW(copies(params), **options)
    follow(agr_cuda.AdamW(params, backend=backend, **options), theirs, psi)


@pytest.mark.parametrize("fed", [same, psi])
def test_in_float32_it_is_torchs_to_1e_6(fed: GRADIENTS, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    theirs = torch.optim.AdamW(copies(params), amsgrad=True)
    follow(agr_cuda.AdamW(params, amsgrad=True, agr=fed is psi, backend=backend), theirs, fed)


@pytest.mark.parametrize("lr_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_may_be_a_tensor(lr_type: torch.dtype, shape: tuple, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    lr = torch.full(shape, 3e-3, dtype=lr_type)
    theirs = torch.optim.AdamW(copies(params), lr=lr.item())
    follow(agr_cuda.AdamW(params, lr=lr, agr=False, backend=backend), theirs, same)


def test_a_change_inside_an_lr_tensor_is_seen(backend, device, generator) -> None:
    params = parameters(generator, [(31,)], device=device)
    lr = torch.tensor(0.5)
    ours = agr_cuda.AdamW(params, lr=lr, agr=False, backend=backend)
    lr.fill_(1e-3)
    follow(ours, torch.optim.AdamW(copies(params), lr=lr.item()), same)


def test_groups(backend, device, generator) -> None:
    def groups(params: list[torch.Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": params[:3], "lr": 1e-2, "amsgrad": True},
            {"params": params[3:4]},
            {"params": params[4:], "weight_decay": 0.0, "betas": (0.8, 0.9), "maximize": True, "eps": 1e-4},
        ]

    params = parameters(generator, SHAPES, double_or_single(backend), device)
    theirs = torch.optim.AdamW(groups(copies(params)), lr=2e-3)
    follow(agr_cuda.AdamW(groups(params), lr=2e-3, agr=False, backend=backend), theirs, same)


def test_agr_off_for_some_groups(backend, device, generator) -> None:
    """The gradients of the first group alone are regularized."""
    dtype = double_or_single(backend)
    weights, biases = (parameters(generator, [(64, 33), (7,)], dtype, device) for _ in range(2))
    ours = agr_cuda.AdamW([{"params": weights}, {"params": biases, "agr": False, "weight_decay": 0.0}], backend=backend)
    mine = [*weights, *biases]
    other = copies(mine)
    theirs = torch.optim.AdamW([{"params": other[:2]}, {"params": other[2:], "weight_decay": 0.0}])
    for step in range(STEPS):
        for index, (p, q) in enumerate(zip(mine, other, strict=True)):
            p.grad = gradient(p, generator, step)
            q.grad = psi(p.grad) if index < 2 else p.grad.clone()
        ours.step()
        theirs.step()
    assert_parameters_close(mine, other)


@pytest.mark.parametrize("fed", [same, psi])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_parameters(fed: GRADIENTS, amsgrad: bool, generator) -> None:
    params = parameters(generator, [(7,), (64, 33), (), (0,)], torch.complex128)
    theirs = torch.optim.AdamW(copies(params), amsgrad=amsgrad)
    follow(agr_cuda.AdamW(params, amsgrad=amsgrad, agr=fed is psi), theirs, fed)


@pytest.mark.parametrize("fed", [same, psi])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_differentiable(fed: GRADIENTS, amsgrad: bool, generator) -> None:
    """torch takes the bias corrections in float32 here, hence the bound."""
    params = parameters(generator, [(7,), (64, 33), (1009,)], torch.float64)
    for p in params:
        p.requires_grad_(False)
    theirs = torch.optim.AdamW(copies(params), amsgrad=amsgrad, differentiable=True)
    for group in theirs.param_groups:
        for q in group["params"]:
            q.requires_grad_(False)
    follow(agr_cuda.AdamW(params, amsgrad=amsgrad, agr=fed is psi, differentiable=True), theirs, fed, 1e-6)


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"foreach": False}, {"capturable": True}, {"fused": False}], ids=name
)
def test_flags_about_how_change_nothing_about_what(flags: dict, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    theirs = torch.optim.AdamW(copies(params))
    follow(agr_cuda.AdamW(params, agr=False, **flags), theirs, same)


def test_clipping_is_clip_grad_norm_before_the_step(backend, device, generator) -> None:
    """torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm, so eps is 1e-6 here."""
    params = parameters(generator, [(31,), (64, 33), (7,)], double_or_single(backend), device)
    other = copies(params)
    ours = agr_cuda.AdamW(params, eps=1e-6, agr=False, max_grad_norm=0.4, backend=backend)
    theirs = torch.optim.AdamW(other, eps=1e-6)
    for step in range(STEPS):
        for p, q in zip(params, other, strict=True):
            p.grad = gradient(p, generator, step)
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(other, 0.4)
        ours.step()
        theirs.step()
    assert_parameters_close(params, other)
